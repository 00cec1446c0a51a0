"""Says what a rank holds of a tensor that exists for some slices of a whole."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moe_unlearn.checkpoint.tensor_file import Kind


class Slices:
    """Slices of a whole tensor [count, ...] along dimension 0: `values` [M, ...], those of `ids`, int64 [M].

    What a rank holds of a state that exists for trained slices alone, or of one that no DTensor describes; ids are of
    the whole, so that they mean the same on all ranks. Raises ValueError unless ids ascend within [0, count).
    """

    def __init__(self, ids: Tensor, values: Tensor, count: int):
        numbers = ids.tolist()
        if values.dim() == 0 or len(numbers) != len(values):
            raise ValueError(f"expected a value for each of {len(numbers)} slices; got shape {list(values.shape)}")
        if numbers and not (numbers[0] >= 0 and numbers[-1] < count and all(a < b for a, b in pairwise(numbers))):
            raise ValueError(f"expected ascending ids of slices in [0, {count}); got {numbers}")
        self.ids, self.values, self.count = ids, values, count
        starts = [i for i, id in enumerate(numbers) if i == 0 or id != numbers[i - 1] + 1]
        # by the first id of consecutive slices, their place in `values`
        self._runs = {numbers[a]: (a, b) for a, b in pairwise([*starts, len(numbers)])}

    @property
    def kind(self) -> Kind:
        """Return the kind of the whole tensor."""
        return Kind(self.values.dtype, (self.count, *self.values.shape[1:]))

    def size(self) -> torch.Size:
        """Return the shape of the whole tensor."""
        return torch.Size(self.kind.shape)

    def within(self, start: int, stop: int) -> "Slices":
        """Return those of [start, stop), with the same ids."""
        inside = (self.ids >= start) & (self.ids < stop)
        return Slices(self.ids[inside], self.values[inside], self.count)

    # the protocol by which torch's planners treat what is no tensor as one that is shared out

    def __create_write_items__(self, fqn: str, this: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.values.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        rest = self.values.shape[1:]
        return [
            ChunkStorageMetadata(torch.Size([first, *[0] * len(rest)]), torch.Size([stop - start, *rest]))
            for first, (start, stop) in self._runs.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        start, stop = self._runs[index.offset[0]]
        return self.values[start:stop]
