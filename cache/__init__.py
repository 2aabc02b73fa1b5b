"""The store of regions and embeddings: sharded Zarr with provenance; no learning library."""

from ezsd.cache.errors import (
    StoreBusy,
    StoreError,
    StoreIncomplete,
    StoreKeyError,
    StoreMismatch,
    StoreUnreadable,
)
from ezsd.cache.files import FileLock, file_digest, rename, sync, write_atomic
from ezsd.cache.format.commit_mark import is_committed, is_mark_lost
from ezsd.cache.format.manifest import Manifest, Origin, images_digest
from ezsd.cache.format.records import GroundTruthRows, ProposalRows, RegionRows
from ezsd.cache.format.regions import OPTIONAL, PER_IMAGE, PER_STORE, PRODUCTS, EmbeddingType, region_schema
from ezsd.cache.format.schema import Block, Field, PerImage, PerStore, RaggedRows, Schema
from ezsd.cache.format.sealed_json import JSON, Difference, canonical_json, differences, short_json
from ezsd.cache.journal.commit import commit_numbered
from ezsd.cache.journal.disk_room import Forecast, forecast
from ezsd.cache.journal.entries import read_note
from ezsd.cache.journal.plan import (
    forget_block,
    journaled_bad_images,
    read_per_store,
    read_plan,
    write_block,
)
from ezsd.cache.journal.shards import ShardTask, commit_shard
from ezsd.cache.journal.unfinished import Unfinished
from ezsd.cache.reader import Product, Store, Verify
from ezsd.cache.storage.locations import read_environment
from ezsd.cache.tools.compare import Comparison, compare
from ezsd.cache.tools.export import Format, export
from ezsd.cache.tools.inspect import ProductInfo, StoreInfo, info, list_stores, records_schema
from ezsd.cache.tools.leftovers import Leftovers, collect
from ezsd.cache.tools.repair import RepairReport, RowSource, StoredValues, repair
from ezsd.cache.tools.transfer import pull, push
from ezsd.cache.tools.verify import Damage, verify
from ezsd.cache.writer import StoreWriter

__all__ = [
    "Block",
    "Comparison",
    "Damage",
    "Difference",
    "EmbeddingType",
    "Field",
    "FileLock",
    "Forecast",
    "Format",
    "GroundTruthRows",
    "JSON",
    "Leftovers",
    "Manifest",
    "OPTIONAL",
    "Origin",
    "PER_IMAGE",
    "PER_STORE",
    "PRODUCTS",
    "PerImage",
    "PerStore",
    "Product",
    "ProductInfo",
    "ProposalRows",
    "RaggedRows",
    "RegionRows",
    "RepairReport",
    "RowSource",
    "Schema",
    "ShardTask",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreIncomplete",
    "StoreInfo",
    "StoreKeyError",
    "StoreMismatch",
    "StoreUnreadable",
    "StoreWriter",
    "StoredValues",
    "Unfinished",
    "Verify",
    "canonical_json",
    "collect",
    "commit_numbered",
    "commit_shard",
    "compare",
    "differences",
    "export",
    "file_digest",
    "forecast",
    "forget_block",
    "images_digest",
    "info",
    "is_committed",
    "is_mark_lost",
    "journaled_bad_images",
    "list_stores",
    "pull",
    "push",
    "read_environment",
    "read_note",
    "read_per_store",
    "read_plan",
    "records_schema",
    "region_schema",
    "rename",
    "repair",
    "short_json",
    "sync",
    "verify",
    "write_atomic",
    "write_block",
]
