"""How many positions a stack of strided convolutions leaves, and the padding that makes a way back exact."""

from collections.abc import Sequence


def convolution_length(length: int, kernel_size: int, stride: int, padding: int) -> int:
    """Positions that a convolution makes of `length`."""
    return (length + 2 * padding - kernel_size) // stride + 1


def deconvolution_length(length: int, kernel_size: int, stride: int, padding: int, output_padding: int = 0) -> int:
    """Positions that a transposed convolution makes of `length`."""
    return (length - 1) * stride - 2 * padding + kernel_size + output_padding


def start_length(length: int, strides: Sequence[int]) -> int:
    """Positions to begin with, so that growing by every stride gives at least `length`."""
    for stride in reversed(strides):
        length = -(-length // stride)
    return length


def literal_length(length: int, kernel_sizes: Sequence[int], strides: Sequence[int]) -> int:
    """What the checklist's own arithmetic (padding 1 everywhere) makes of `length`: 13 for 16, so a tail is lost."""
    found = start_length(length, strides)
    for kernel_size, stride in zip(kernel_sizes, strides):
        found = deconvolution_length(found, kernel_size, stride, 1)
    return found


def exact_padding(kernel_size: int, stride: int) -> tuple[int, int]:
    """Padding and output padding after which the first `length * stride` positions are those of a layer."""
    odd = (kernel_size - stride) % 2
    if stride == 1:  # no output padding there: one position too many, at the end
        return (kernel_size - stride) // 2, 0
    return (kernel_size - stride + odd) // 2, odd


def stack_problem(channels: Sequence[int], kernel_sizes: Sequence[int], strides: Sequence[int]) -> str | None:
    """What is wrong with the lists of a stack of layers; None where nothing is."""
    counts = {"channels": len(channels), "kernel_sizes": len(kernel_sizes), "strides": len(strides)}
    if len(set(counts.values())) > 1:
        return ", ".join(f"{count} {name}" for name, count in counts.items()) + "; write lists of equal length"
    if not channels:
        return "no layers; write one number or more in every list"
    if min(*channels, *kernel_sizes, *strides) < 1:
        return f"channels {[*channels]}, kernel_sizes {[*kernel_sizes]}, strides {[*strides]}; write numbers over 0"
    short = [(kernel_size, stride) for kernel_size, stride in zip(kernel_sizes, strides) if kernel_size < stride]
    if short:
        return f"a kernel of {short[0][0]} under a stride of {short[0][1]} leaves positions out; write a wider kernel"
    return None
