"""Host staging buffers of the eager paths."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from ktjax.lora import LoRA

Array = np.ndarray[Any, Any]

# A cache line, and what a JAX CPU array must have to alias NumPy memory.
ALIGNMENT = 64


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialised array whose first byte lies on a 64-byte boundary."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class KExpertsSFTBuffer:
    """Host memory that the kernels read and write, reused from call to call.

    Buffers are shared by geometry and dtype, not by the number of tokens: the token
    arrays hold a power of two of tokens and grow in place, so that any number of
    different lengths costs less than twice the longest one. Whoever fills a buffer
    holds its `lock` until the results are copied out. Memory that nobody has written
    costs address space only.

    Attributes:
      lock: held while the contents are in use.
      capacity: tokens that fit, a power of two.
      input_cpu: `[capacity, hidden]` in `dtype`; so are `output_cpu`, `grad_output_cpu`
        and `grad_input_cpu`.
      expert_ids_cpu: `[capacity, k]` int32.
      weights_cpu: `[capacity, k]` float32.
    """

    _buffer_lock: ClassVar[threading.Lock] = threading.Lock()
    capture_buffers: ClassVar[
        collections.OrderedDict[tuple[Any, ...], KExpertsSFTBuffer]
    ] = collections.OrderedDict()
    # All layers of a model have one geometry, so a handful serves several models.
    MAX_BUFFERS: ClassVar[int] = 8

    input_cpu: Array
    expert_ids_cpu: Array
    weights_cpu: Array
    output_cpu: Array
    grad_output_cpu: Array
    grad_input_cpu: Array

    def __init__(
        self,
        qlen: int,
        hidden_size: int,
        moe_intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        lora_rank: int,
        dtype: Any = ml_dtypes.bfloat16,
    ) -> None:
        """Allocate for at least `qlen` tokens; `get_buffer` is the shared way."""
        self.hidden_size = hidden_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.lora_rank = lora_rank
        self.dtype = np.dtype(dtype)
        self.lock = threading.RLock()
        self.capacity = 0
        self._grow(qlen)
        shapes = LoRA.shapes(num_experts, hidden_size, moe_intermediate_size, lora_rank)
        self._lora_grads = {
            f"grad_{name[:-2]}_lora_{name[-1]}": aligned_empty(shape, np.float32)
            for name, shape in shapes.items()
        }

    @classmethod
    def get_buffer(
        cls,
        qlen: int,
        hidden_size: int,
        moe_intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        lora_rank: int,
        dtype: Any = ml_dtypes.bfloat16,
    ) -> KExpertsSFTBuffer:
        """The shared buffer of a geometry, grown to `qlen` tokens; thread-safe.

        Beyond `MAX_BUFFERS` geometries the one unused for longest leaves the cache; who
        still holds it may go on.

        Args:
          qlen: tokens that must fit.
          hidden_size: width of the layer's input and output.
          moe_intermediate_size: width of an expert's gate and up projections.
          num_experts: experts of the layer.
          num_experts_per_tok: experts that each token is sent to.
          lora_rank: rank of the adapters.
          dtype: of the activations, float32 or bfloat16.

        Raises:
          ValueError: a negative `qlen`.
        """
        if qlen < 0:
            raise ValueError(f"KExpertsSFTBuffer: qlen must be at least 0, got {qlen}")
        geometry = (
            hidden_size,
            moe_intermediate_size,
            num_experts,
            num_experts_per_tok,
            lora_rank,
            np.dtype(dtype),
        )
        with cls._buffer_lock:
            buffer = cls.capture_buffers.get(geometry)
            if buffer is None:
                buffer = cls.capture_buffers[geometry] = cls(qlen, *geometry)
                while len(cls.capture_buffers) > cls.MAX_BUFFERS:
                    cls.capture_buffers.popitem(last=False)
            cls.capture_buffers.move_to_end(geometry)
        # Outside the cache's lock: the buffer's own may be held for a whole forward.
        buffer.reserve(qlen)
        return buffer

    @classmethod
    def clear_cache(cls) -> None:
        """Forget every shared buffer; their memory goes when nobody holds them."""
        with cls._buffer_lock:
            cls.capture_buffers.clear()

    def reserve(self, qlen: int) -> None:
        """Make room for `qlen` tokens; growing does not keep the old contents."""
        if qlen > self.capacity:
            with self.lock:
                if qlen > self.capacity:
                    self._grow(qlen)

    def get_lora_grads(self) -> dict[str, Array]:
        """The six LoRA gradients by name, float32, shaped as their parameters.

        These are the buffers themselves, not copies: copy what must outlive their next
        use.
        """
        return dict(self._lora_grads)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, whether touched or not."""
        tokens = (
            self.input_cpu,
            self.expert_ids_cpu,
            self.weights_cpu,
            self.output_cpu,
            self.grad_output_cpu,
            self.grad_input_cpu,
        )
        return sum(array.nbytes for array in (*tokens, *self._lora_grads.values()))

    def _grow(self, qlen: int) -> None:
        capacity = 1 << max(qlen - 1, 0).bit_length()
        rows = (capacity, self.hidden_size)
        slots = (capacity, self.num_experts_per_tok)
        self.input_cpu = aligned_empty(rows, self.dtype)
        self.output_cpu = aligned_empty(rows, self.dtype)
        self.grad_output_cpu = aligned_empty(rows, self.dtype)
        self.grad_input_cpu = aligned_empty(rows, self.dtype)
        self.expert_ids_cpu = aligned_empty(slots, np.int32)
        self.weights_cpu = aligned_empty(slots, np.float32)
        # Last: a reader without the lock who sees the capacity finds the arrays.
        self.capacity = capacity


class KExpertsCPUBuffer:
    """Host memory for the inputs of one piece of an inference forward.

    Whoever takes a buffer owns it until it is given back, after the kernels have read
    it. So no forward ever writes into what another still needs, however many layers
    are in flight; two layers in turns use two buffers in turns.

    Attributes:
      input_cpu: `[tokens, hidden]`, float32 or bfloat16.
      expert_ids_cpu: `[tokens, k]` int32.
      weights_cpu: `[tokens, k]` float32.
      capture_bs: numbers of tokens whose buffers are kept once they were used. Of
        others, only those of the last number are.
      buffer_depth: how many buffers of a kind are kept.
    """

    capture_bs: ClassVar[tuple[int, ...]] = ()
    buffer_depth: ClassVar[int] = 2

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _free: ClassVar[dict[tuple[Any, ...], list[KExpertsCPUBuffer]]] = {}
    # What `_free` has for a number of tokens that is not captured.
    _last: ClassVar[tuple[Any, ...] | None] = None

    def __init__(self, tokens: int, hidden: int, k: int, dtype: Any) -> None:
        """Allocate; `take` is the shared way."""
        self.input_cpu = aligned_empty((tokens, hidden), dtype)
        self.expert_ids_cpu = aligned_empty((tokens, k), np.int32)
        self.weights_cpu = aligned_empty((tokens, k), np.float32)

    @classmethod
    def take(cls, tokens: int, hidden: int, k: int, dtype: Any) -> KExpertsCPUBuffer:
        """A buffer of this size that nobody else has; thread-safe.

        Args:
          tokens: its number of tokens.
          hidden: width of the layer's input.
          k: experts that each token is sent to.
          dtype: of the activations.
        """
        with cls._lock:
            free = cls._free.get((tokens, hidden, k, np.dtype(dtype)))
            if free:
                return free.pop()
        return cls(tokens, hidden, k, dtype)

    def give_back(self) -> None:
        """Offer the buffer to others; nothing may read it any more."""
        cls = type(self)
        (tokens, hidden), k = self.input_cpu.shape, self.expert_ids_cpu.shape[1]
        key = (tokens, hidden, k, self.input_cpu.dtype)
        with cls._lock:
            if tokens not in cls.capture_bs and key != cls._last:
                cls._drop_last()
                cls._last = key
            free = cls._free.setdefault(key, [])
            if len(free) < cls.buffer_depth:
                free.append(self)

    @classmethod
    def capture(cls, sizes: Sequence[int]) -> None:
        """Set `capture_bs`; buffers of sizes that left it are dropped."""
        with cls._lock:
            cls.capture_bs = tuple(sizes)
            cls._last = None
            for key in [key for key in cls._free if key[0] not in cls.capture_bs]:
                del cls._free[key]

    @classmethod
    def clear_cache(cls) -> None:
        """Forget every free buffer."""
        with cls._lock:
            cls._free.clear()
            cls._last = None

    @classmethod
    def _drop_last(cls) -> None:
        if cls._last is not None:
            cls._free.pop(cls._last, None)
