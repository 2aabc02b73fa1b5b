"""A store as a PyTorch dataset, for training code of one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ezsd.cache import Store


class RegionDataset(Dataset[dict[str, Tensor]]):
    """Cached regions and base objects of a store, one item per image.

    An item has `image_id` (), `size` (2,) of the image as width and height, and for K regions and N base objects:
    `boxes` (K, 4) xyxy in pixels of the image, `confidence` (K,), `embeddings` (K, D) unit vectors;
    `ground_truth_boxes` (N, 4), `ground_truth_labels` (N,) as positions in `names`, `ground_truth_embeddings` (N, D).
    Floating values are float32. Batches of different K and N need a `collate_fn` of one's own.

    Args:
        store: a store, its folder or its URL.
        image_ids: images to take, in this order; None for all.
    """

    def __init__(self, store: Store | str | os.PathLike[str], image_ids: Sequence[int] | None = None) -> None:
        self.store = store if isinstance(store, Store) else Store(store)
        self.store.require_regions()
        self._position = {int(image): place for place, image in enumerate(self.store.image_ids)}
        self._sizes = self.store.sizes
        self.image_ids = tuple(self._position) if image_ids is None else tuple(map(int, image_ids))
        for image in self.image_ids:
            if image not in self._position:
                # Says what the store has.
                self.store.regions[image]

    @property
    def names(self) -> tuple[str, ...]:
        """Class names of the store, base classes first."""
        return self.store.text[0]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.image_ids[index]
        regions, objects = self.store.regions[image], self.store.ground_truth[image]
        return {
            "image_id": torch.tensor(image),
            "size": torch.from_numpy(self._sizes[self._position[image]].copy()),
            "boxes": torch.tensor(regions.box),
            "confidence": torch.tensor(regions.confidence),
            "embeddings": torch.tensor(regions.embedding).float(),
            "ground_truth_boxes": torch.tensor(objects.box),
            "ground_truth_labels": torch.tensor(objects.class_index).long(),
            "ground_truth_embeddings": torch.tensor(objects.embedding).float(),
        }
