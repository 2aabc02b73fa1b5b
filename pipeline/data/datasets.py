"""Datasets by name or by a TOML file: which files, which names are base and which novel."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ezsd.choices import Benchmark
from ezsd.data.pascal_voc import VOC_SPLITS
from ezsd.data.shapes import BENCHMARKS, SPLITS
from ezsd.errors import VocabularyError
from ezsd.pipeline.config.descriptions import read_descriptions
from ezsd.pipeline.config.schema import TeacherConfig
from ezsd.pipeline.data.annotation_cache import Category, read_categories, sound_categories
from ezsd.pipeline.data.image_source import ImageSource, image_source, needed_files
from ezsd.pipeline.data.images import Exif
from ezsd.pipeline.data.single_json import find_images, path_from
from ezsd.pipeline.data.split import frequency_split, is_names, named_split
from ezsd.pipeline.data.toml_files import read_toml
from ezsd.pipeline.errors import ArgumentError, DatasetError
from ezsd.pipeline.files import as_json
from ezsd.vocabulary import COCO_SPLIT, Split, canonical, clean_names, first_few, resolve, suggest, templates
from ezsd.vocabulary import prompts as make_prompts

log = logging.getLogger("ezsd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A dataset: its place on disk, the split of its classes, and the rule for reading its images."""

    name: str
    """One of `DATASETS`, what a TOML file says, or the name of a JSON file."""
    root: Path
    """Folder that holds images and annotations."""
    split: Split
    """Base and novel names."""
    train_images: str
    """Folder or tar files below root, see `image_source`."""
    train_annotations: str
    """COCO-format JSON below root."""
    val_images: str | None
    """Folder or tar files below root, see `image_source`; None without a validation part."""
    val_annotations: str | None
    """COCO-format JSON below root; None without a validation part."""
    preset: str = "coco"
    """Settings to start from, unless others are asked for."""
    prompts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the teacher that belong to the data: template, background, names, and the file of descriptions (see
    `TeacherConfig`)."""
    exif: Exif = "turn"
    """Rule for the EXIF orientation of its images."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts: "train", and "val" if there is a validation part."""
        return ("train",) if self.val_annotations is None else ("train", "val")

    def annotations(self, part: str) -> Path:
        """The annotation file of "train" or "val". DatasetError for a part that the dataset does not have."""
        return self.root / self._place(part, "annotations")

    def images(self, part: str) -> ImageSource:
        """The images of "train" or "val". DatasetError for a part that the dataset does not have."""
        return image_source(self.root, self._place(part, "images"), self.exif)

    def _place(self, part: str, key: str) -> str:
        self.require_part(part)
        return str(getattr(self, f"{part}_{key}"))

    def require_part(self, part: str) -> None:
        """DatasetError unless the dataset has a part."""
        if part not in self.parts:
            raise DatasetError(
                f"dataset {self.name} has no validation part to evaluate on; take `split=train`, or give `detections` "
                "(the output of `ezsd detect --json`) and the `annotations` of other images"
            )

    def prompt_settings(self) -> TeacherConfig:
        """Settings of a teacher with the dataset's own prompts. ConfigError if its descriptions are not sound."""
        file = self.prompts.get("descriptions")
        descriptions = {"descriptions": read_descriptions(Path(file))} if file else {}
        return TeacherConfig(name="", **{**self.prompts, **descriptions})

    def require(self, *parts: str) -> Dataset:
        """Self, once annotations and images of all of its parts, or of some, exist.

        Raises:
            DatasetError: names all places that do not exist, and what is there instead.
        """
        for part in parts:
            self.require_part(part)
        missing = self.missing(*parts)
        if missing:
            raise DatasetError(f"`data_root={self.root}`: {'; '.join(missing)}")
        return self

    def missing(self, *parts: str) -> list[str]:
        """A phrase for each place that does not exist; of all parts, or of some."""
        lacking = [part for part in parts if part not in self.parts]
        if lacking:
            return ["no validation part"]
        wanted = [(part, key) for part in parts or self.parts for key in ("annotations", "images")]
        named: dict[str, list[str]] = {}
        for part, key in wanted:
            named.setdefault(getattr(self, f"{part}_{key}"), []).append(f"[{part}] {key}")
        layout = f"{self.name} has {', '.join(named)}"
        absent = {
            place: next((file for file in needed_files(self.root, place) if not (self.root / file).exists()), None)
            for place in named
        }
        missing = {file: named[place] for place, file in absent.items() if file is not None}
        if self.name in DATASETS:
            return [f"no {place} in it; {layout}" for place in missing]
        return [
            f"no {place} in it; {' and '.join(keys)} say{'s' * (len(keys) == 1)} so; {self._near(place)}"
            for place, keys in missing.items()
        ]

    def _near(self, place: str) -> str:
        """Suggest a place that may have been meant instead of one that does not exist."""
        parent, kind = (self.root / place).parent, Path(place).suffix
        if not parent.is_dir():
            return f"there is no folder {parent}"
        there = sorted(one.name for one in parent.iterdir() if one.is_dir() != bool(kind))
        return suggest(Path(place).name, there) if there else f"{parent} is empty"

    def definition(self) -> dict[str, object]:
        """Everything but the root, as JSON has it: what a store, a run or a worker needs to find the data again."""
        table = dataclasses.asdict(self)
        del table["root"]
        definition: dict[str, object] = as_json(table)
        return definition


def from_definition(definition: Mapping[str, object], root: Path) -> Dataset:
    """The inverse of `Dataset.definition`."""
    split = cast("Mapping[str, Sequence[str]]", definition["split"])
    # Who does not say how images are read made its store before they were turned.
    values = {"exif": "legacy", **definition, "split": Split(base=tuple(split["base"]), novel=tuple(split["novel"]))}
    return Dataset(root=root, **values)  # type: ignore[arg-type]


def recorded_dataset(definition: object, name: str, root: Path) -> Dataset:
    """The dataset that a store or a run recorded; without a record, a built-in one by its name.

    Raises:
        DatasetError: there is no record, and the name is not in `DATASETS`.
    """
    if isinstance(definition, dict):
        return from_definition(definition, root)
    return dataclasses.replace(find_dataset(name, root), exif="legacy")


DRAWN: dict[str, tuple[Benchmark, Split]] = {
    benchmark + suffix: (benchmark, split)
    for benchmark in BENCHMARKS
    for suffix, split in zip(("", "-split2", "-split3", "-split4"), SPLITS, strict=True)
}
"""The embedded benchmarks by name of dataset: which scenes, and which of their names are novel."""
DATASETS = (*DRAWN, "coco", "lvis", "lvis-frequent", *VOC_SPLITS)
"""Names that `find_dataset` knows; anything that ends in .toml or .json is a file."""


def find_dataset(
    name: str, root: Path | None = None, *, strict: bool = True, novel: Sequence[str] | None = None
) -> Dataset:
    """A dataset by name, by a TOML file or by one annotation file.

    Only what decides the split is read: of "lvis", of a JSON file and of a TOML file whose novel names are "others" the
    categories of the training annotations.

    Args:
        name: one of `DATASETS`, or the path of a TOML file, or of a COCO-format JSON file: a dataset without validation
            part whose classes are all base ones but for `novel`.
        root: folder with images and annotations; data/NAME (of "shapes-split2" data/shapes, of VOC's splits data/voc,
            and so on) or the file's own by default. Of a JSON file see `find_images`.
        strict: False takes what is sound of class tables and prompts that are faulty: `ezsd.pipeline.data.check` lists
            the rest.
        novel: novel classes of a JSON file, which it need not know.

    Raises:
        ArgumentError: `novel` for anything but a JSON file.
        DatasetError: an unknown name, or a TOML file that is not as it must be.
        AnnotationError: the categories cannot be read.
        VocabularyError: a name is empty or doubled, or prompts cannot be made of the names.
    """
    require_known(name)
    if name.lower().endswith(".json"):
        return _from_json(Path(name), root, strict, novel)
    if novel is not None:
        raise ArgumentError(f"`novel` goes with a JSON file as `dataset`; {name} says itself which classes are novel")
    if name.lower().endswith(".toml"):
        return _from_toml(Path(name), root, strict)
    if name in DRAWN:
        benchmark, split = DRAWN[name]
        return _standard(name, root or Path("data") / benchmark, split, "train", "val", preset="shapes")
    if name in VOC_SPLITS:
        return _voc(name, root or Path("data/voc"))
    folder = root or Path("data") / name
    if name == "coco":
        return _standard(name, folder, COCO_SPLIT, "train2017", "val2017")
    return _lvis(name, folder)


def _files_of_datasets(folder: Path) -> str:
    """Advice for a folder that was given as a dataset: the files in it that may be one."""
    found = sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in (".toml", ".json"))
    return f"give a file in it: {first_few(found, 3)}" if found else "give a file that ends in .toml or .json"


def require_known(name: str) -> None:
    """DatasetError for a name that is not a dataset's, or a file that is not there."""
    if name.lower().endswith((".toml", ".json")):
        if not Path(name).is_file():
            raise DatasetError(f"`dataset={name}`: no such file")
    elif name in DATASETS:
        return
    elif Path(name).is_dir():
        raise DatasetError(f"`dataset={name}`: is a folder; {_files_of_datasets(Path(name))}")
    else:
        choice = ", ".join(DATASETS)
        raise DatasetError(f"`dataset={name}`: unknown; choose one of {choice}, or a file that ends in .toml or .json")


def _standard(name: str, root: Path, split: Split, train: str, val: str, *, preset: str = "coco") -> Dataset:
    """Folders and files named as COCO's are."""
    return Dataset(
        name=name,
        root=root,
        split=split,
        train_images=train,
        train_annotations=f"annotations/instances_{train}.json",
        val_images=val,
        val_annotations=f"annotations/instances_{val}.json",
        preset=preset,
    )


_VOC_PRESET = "photos"
"""Preset of the datasets of `VOC_SPLITS`, by name and by the file that `ezsd data voc` writes."""


def _voc(name: str, root: Path) -> Dataset:
    """Pascal VOC as `ezsd data voc` lays it out."""
    return Dataset(
        name=name,
        root=root,
        split=VOC_SPLITS[name],
        train_images="train",
        train_annotations="train.json",
        val_images="val",
        val_annotations="val.json",
        preset=_VOC_PRESET,
    )


def _from_json(path: Path, root: Path | None, strict: bool, novel: Sequence[str] | None) -> Dataset:
    """The images and categories of one file, none of them for validation."""
    categories = (read_categories if strict else sound_categories)(path)
    left_out = _only_supercategories(categories)
    names = {canonical(one.name): one.name for one in categories if canonical(one.name) not in left_out}
    if not names:
        raise DatasetError(f"{path}: categories: expected at least one with a name, found none; add the classes")
    folder, images = find_images(path, root)
    return Dataset(
        name=dataset_name(path.stem),
        root=folder,
        split=named_split(tuple(names.values()), where=path, base=None, novel=novel),
        train_images=images,
        train_annotations=path_from(folder, path),
        val_images=None,
        val_annotations=None,
    )


def dataset_name(words: str) -> str:
    """The name of a dataset made of a folder's or file's: letters, digits, '-', '_' and '.', and no built-in's."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", words).strip("-_.") or "dataset"
    return f"own-{name}" if name in DATASETS else name


def _lvis(name: str, root: Path) -> Dataset:
    """LVIS v1 over COCO's image folders; the JSON's own `frequency` decides, by name.

    "lvis": 866 frequent and common names are base, 337 rare ones novel. "lvis-frequent": 405 frequent names are base,
    461 common and 337 rare ones novel.
    """
    train = "annotations/lvis_v1_train.json"
    base = {"lvis": "fc", "lvis-frequent": "f"}[name]
    categories = _categories(root, train, name)
    for category in categories:
        if category.frequency not in ("f", "c", "r"):
            raise DatasetError(
                f"{root / train}: category {category.name!r}: expected a frequency of f, c or r, found "
                f"{category.frequency!r}. `dataset={name}` needs the files of LVIS v1"
            )
    split = frequency_split({category.name: category.frequency for category in categories}, base)
    val = "annotations/lvis_v1_val.json"
    return Dataset(
        name=name,
        root=root,
        split=split,
        # Both parts take images from both of COCO's folders, which their file names begin with.
        train_images=".",
        train_annotations=train,
        val_images=".",
        val_annotations=val,
        preset="lvis",
        prompts={"names": "clean"},
    )


def _categories(root: Path, annotations: str, name: str, *, strict: bool = True) -> list[Category]:
    if not (root / annotations).is_file():
        raise DatasetError(f"`data_root={root}`: no {annotations} in it, which decides the split of {name}")
    return (read_categories if strict else sound_categories)(root / annotations)


_TOML_KEYS = {
    "": ("name", "train", "val", "classes", "prompts", "exif"),
    "train": ("images", "annotations"),
    "val": ("images", "annotations"),
    "classes": ("base", "novel"),
    "prompts": ("template", "background", "names", "descriptions"),
}


def _from_toml(path: Path, root: Path | None, strict: bool) -> Dataset:
    """A dataset of one's own; see docs/datasets.md."""
    try:
        tables = read_toml(path)
    except ValueError as error:
        raise DatasetError(f"{path}: is not valid TOML: {error}") from error
    _check_toml(tables, path)
    folder = root or path.parent
    prompts = tables.get("prompts", {})
    if "descriptions" in prompts:
        prompts = {**prompts, "descriptions": str(folder / prompts["descriptions"])}
    dataset = Dataset(
        name=tables["name"],
        root=folder,
        split=_toml_split(tables, folder, path, strict),
        train_images=tables["train"]["images"],
        train_annotations=tables["train"]["annotations"],
        val_images=tables["val"]["images"] if "val" in tables else None,
        val_annotations=tables["val"]["annotations"] if "val" in tables else None,
        # Files of `ezsd data voc` alone may have these names, as is checked below.
        preset=_VOC_PRESET if tables["name"] in VOC_SPLITS else "coco",
        prompts=prompts,
        exif=tables.get("exif", "turn"),
    )
    if dataset.name in DATASETS and dataset.split != VOC_SPLITS.get(dataset.name):
        raise DatasetError(f"{path}: name: {dataset.name!r} is a built-in dataset; choose another")
    if strict:
        require_prompts(dataset.split, dataset.prompt_settings())
    return dataset


def require_prompts(split: Split, teacher: TeacherConfig) -> None:
    """Refuse settings of which no prompts can be made for the names of a split.

    Raises:
        VocabularyError: a template without "{}", two names with the same prompt, or a description of a name that is
            none of the split's nor the background's.
    """
    words = clean_names(split.names) if teacher.names == "clean" else split.names
    for template in templates(teacher.template):
        make_prompts(words, template)
    if not teacher.descriptions:
        return
    # A class may have the background's name.
    known = {canonical(name): name for name in (*teacher.backgrounds, *split.names)}
    try:
        resolve([name for name, *_ in teacher.descriptions], list(known.values()))
    except VocabularyError as error:
        raise VocabularyError(f"`teacher.descriptions`: {error}") from error


def _listed(key: str, value: object) -> bool:
    """Return whether a value is a list of texts, for a key that takes several."""
    return key in ("template", "background") and isinstance(value, list) and all(isinstance(v, str) for v in value)


def _check_toml(tables: dict[str, object], path: Path) -> None:
    """Known keys alone, none missing, texts where texts belong."""
    for section, keys in _TOML_KEYS.items():
        if section == "val" and section not in tables:
            continue
        table = tables.get(section, {}) if section else tables
        where = f"{path}: [{section}]" if section else f"{path}:"
        if not isinstance(table, dict):
            raise DatasetError(f"{where} expected a table, found {table!r}")
        for key in table.keys() - set(keys):
            raise DatasetError(f"{where} unknown key {key!r}; {suggest(key, keys)}")
        optional = ("val", "prompts", "exif") if not section else keys if section == "prompts" else ()
        for key in keys:
            if key not in table and key not in optional:
                raise DatasetError(f"{where} {key} is missing; docs/datasets.md shows a whole file")
        if section not in ("", "classes") and not all(isinstance(v, str) or _listed(k, v) for k, v in table.items()):
            raise DatasetError(f"{where} expected texts, found {table!r}")
    prompts = tables.get("prompts", {})
    assert isinstance(prompts, dict)
    if prompts.get("names", "raw") not in ("raw", "clean"):
        raise DatasetError(f'{path}: [prompts] names: expected "raw" or "clean", found {prompts["names"]!r}')
    if not isinstance(tables["name"], str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", tables["name"]):
        raise DatasetError(f"{path}: name: expected letters, digits, '-', '_' and '.', found {tables['name']!r}")
    if tables.get("exif", "turn") not in ("turn", "ignore"):
        raise DatasetError(f'{path}: exif: expected "turn" or "ignore", found {tables["exif"]!r}')


def _toml_split(tables: dict[str, Mapping[str, object]], root: Path, path: Path, strict: bool) -> Split:
    """Base and novel names; "others" are all other names of the training annotations, in alphabetical order.

    Categories that are only the supercategory of others, as exports have one for a whole tree, are not classes.
    """
    base, novel = tables["classes"]["base"], tables["classes"]["novel"]
    if not is_names(base):
        raise DatasetError(f"{path}: [classes] base: expected a list of names, found {base!r}")
    if is_names(novel):
        return Split(base=tuple(cast("list[str]", base)), novel=tuple(cast("list[str]", novel)))
    if novel != "others":
        raise DatasetError(f'{path}: [classes] novel: expected a list of names or "others", found {novel!r}')
    known = {canonical(name) for name in cast("list[str]", base)}
    train, *others = (
        _categories(root, str(tables[part]["annotations"]), path.name, strict=strict)
        for part in ("train", "val")
        if part in tables
    )
    roots = _only_supercategories(train, *others) - known
    if roots:
        named = ", ".join(repr(name) for name in sorted(roots))
        log.info('%s: novel = "others" leaves out %s: only the supercategory of others, without a box', path, named)
    rest = {canonical(one.name): one.name for one in train if canonical(one.name) not in known | roots}
    return Split(base=tuple(cast("list[str]", base)), novel=tuple(sorted(rest.values())))


def _only_supercategories(*parts: Sequence[Category]) -> set[str]:
    """Names (canonical) that are another's supercategory and of which no file has an annotation."""
    offered = [category for part in parts for category in part]
    above = {canonical(one.supercategory) for one in offered if one.supercategory != one.name}
    used = {canonical(one.name) for one in offered if one.used}
    return {canonical(one.name) for one in offered} & above - used
