"""The choice of the route: whether a layer rotates its activations or its weight.

A layer has three routes. ``input`` rotates the activations before and after the product with W. The other two rotate
the weight and differ in how they form the gradient of the rotations: ``product`` forms it from the gradient of the
weight, a third large product; ``contraction`` forms it from the activations on either side (kernels/poet_linear). The
setting ``route: weight`` stands for both.
"""

from typing import Literal

import torch

from orthotrain.layers.poet.cost_tables import costs_for

RouteChoice = Literal["auto", "input", "weight"]
Route = Literal["input", "product", "contraction"]
ActivationMode = Literal["fast", "mem"]

ROUTES: tuple[Route, ...] = ("input", "product", "contraction")


def choose_route(
    routes: tuple[Route, ...],
    tokens: int,
    d_in: int,
    d_out: int,
    b_in: int,
    b_out: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Route:
    """Choose the cheapest route for one forward and backward pass.

    The choice depends only on shapes, dtype, the name of the device and the table of costs, so all ranks choose alike.

    Args:
        routes: The routes to choose from. A route without costs in the table is left out; the first one always has
            them.
        tokens: Rows of the activations, ``N``.
        d_in: Width of the input.
        d_out: Width of the output.
        b_in: Block size of the input side, 0 if it is not rotated.
        b_out: Block size of the output side, 0 if it is not rotated.
        device: Device of the layer.
        dtype: Dtype of its products.

    Raises:
        ConfigurationError: If a table of costs cannot be read, naming the file.
    """
    (best, slope, start), *others = route_costs(routes, d_in, d_out, b_in, b_out, device, dtype)
    for route, per_token, once in others:
        if (slope - per_token) * tokens + (start - once) > 0:
            best, slope, start = route, per_token, once
    return best


# torch.compile must see constants and not trace the reading of a file
@torch.compiler.assume_constant_result
def route_costs(
    routes: tuple[Route, ...],
    d_in: int,
    d_out: int,
    b_in: int,
    b_out: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[tuple[Route, float, float], ...]:
    """Return each route with its nanoseconds per token and per call.

    Every route has two products with ``W``. ``product`` adds a third one for the weight gradient. ``contraction`` runs
    only the forward pass of the fold, a third of its work. Arguments and errors are those of :func:`choose_route`.
    """
    kind, index = (device, None) if isinstance(device, str) else (device.type, device.index)
    costs, elements = costs_for(kind, index, dtype.itemsize < 4), d_in * d_out
    sides = [(d_in, b_in)] * bool(b_in) + [(d_out, b_out)] * bool(b_out)
    products, fold = 2 * costs.multiply_add * elements, costs.fold(elements, b_in + b_out)
    rotated = sum(costs.rotation(width, size) - costs.rotate_call for width, size in sides)
    costs_of: dict[Route, tuple[float, float]] = {
        "input": (products + rotated, len(sides) * costs.rotate_call),
        "product": (1.5 * products, fold),
    }
    contracted = [costs.contraction(width, size) for width, size in sides]
    if None not in contracted:
        costs_of["contraction"] = (
            products + sum(c[0] for c in contracted if c),
            fold / 3 + sum(c[1] for c in contracted if c),
        )
    return tuple((route, *costs_of[route]) for route in routes if route in costs_of)
