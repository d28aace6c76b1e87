"""Where a layer rotates: its activations (input-centric) or its weight (weight-centric)."""

from typing import Literal

Centre = Literal["auto", "input", "weight"]
ActivationMode = Literal["fast", "mem"]

# A rotation does b FLOPs for every element that it reads and writes, a large product does d: measured on CPU, a rotated
# element costs as much as this many columns of a large product, whatever b is, on top of its b columns.
ELEMENT_COST = 96


def choose_centre(tokens: int, d_in: int, d_out: int, b_in: int, b_out: int) -> Literal["input", "weight"]:
    """Choose the cheaper centre for one forward and backward pass.

    Costs are in multiply-adds. The frozen products with ``W`` are two for the input centre; the weight centre adds the
    weight gradient, a third. Each rotation of a matrix of ``e`` elements costs ``e * (b + ELEMENT_COST)``: three passes
    over the activations of a side (forward, backward for x and for D), or three over the weight for each side.

    Args:
        tokens: Rows of the activations, ``N``.
        d_in: Width of the input.
        d_out: Width of the output.
        b_in: Block size of the input side, 0 if it is not rotated.
        b_out: Block size of the output side, 0 if it is not rotated.
    """
    sides = [(d_in, b_in)] * bool(b_in) + [(d_out, b_out)] * bool(b_out)
    product = tokens * d_in * d_out
    input_centric = 2 * product + 3 * sum(tokens * d * (b + ELEMENT_COST) for d, b in sides)
    weight_centric = 3 * product + 3 * sum(d_in * d_out * (b + ELEMENT_COST) for _, b in sides)
    return "input" if input_centric <= weight_centric else "weight"
