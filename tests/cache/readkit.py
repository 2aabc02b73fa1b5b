"""What a training worker does with a store; a module of its own, since started processes import it by name."""

import hashlib

import numpy as np
import storekit
import torch


class Rows(torch.utils.data.Dataset):
    """Digests of an image's rows: of one image, or of a list of them at once."""

    def __init__(self, store, *, at_once):
        self.store = store
        if at_once:
            self.__getitems__ = self._batch

    def __len__(self):
        return len(storekit.IDS)

    def __getitem__(self, place):
        rows = self.store.regions[storekit.IDS[place]]
        return digest(rows.embedding), digest(rows.box)

    def _batch(self, places):
        batch = self.store.regions.batch([storekit.IDS[place] for place in places])
        cuts = np.cumsum(batch.counts)[:-1]
        fields = (np.split(batch.rows.embedding, cuts), np.split(batch.rows.box, cuts))
        return [(digest(a), digest(b)) for a, b in zip(*fields, strict=True)]


def digest(rows):
    return hashlib.sha256(rows.tobytes()).hexdigest()


def load(store, workers, method, at_once):
    loader = torch.utils.data.DataLoader(
        Rows(store, at_once=at_once),
        batch_size=4,
        num_workers=workers,
        multiprocessing_context=method if workers else None,
        collate_fn=list,
    )
    return [sample for batch in loader for sample in batch]
