"""Three ways to find directions of a latent space: labels, principal components, the decoder's Jacobian.

All in float64; vectors are returned in fp32, in the shape of one latent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dvae.errors import UserError, fold
from dvae.inference.directions import label_regression
from dvae.inference.directions.attributes import LabeledAttributes
from dvae.inference.directions.direction import Direction, DirectionMethod

MIN_IMAGES = 10
"""Images that must show a value, for a direction to it."""
JACOBIAN_RMS = 0.1
"""Strength 1 of a direction of the Jacobian moves x_hat by this root mean square over images and pixels, to first order
(white - black = 2)."""
MAX_LATENT_SIZE = 4096
"""Numbers of a latent up to which its Jacobian is taken."""


def from_labels(
    z: torch.Tensor, codes: torch.Tensor, attributes: LabeledAttributes, names: Iterable[str]
) -> tuple[list[Direction], dict[str, str]]:
    """A direction to each value of the attributes `names`, and those values that are skipped, with the reason.

    Strength 1 takes away what the present value adds to a latent, and adds what the new one does (LabelModel). The
    vector is the mean of that: the displacement from images that lack the value to those that have it, all other
    attributes being equal. z is (N, *latent); codes (N, A) are of all attributes, so that correlated ones are told
    apart.
    """
    directions, skipped = {}, {}
    model = label_regression.fit(z, codes, attributes.values)
    effects = label_regression.regress(z.flatten(1), codes, attributes.sizes, pairs=False).split(attributes.sizes)
    for name in names:
        index = attributes.names.index(name)
        counts = torch.bincount(codes[:, index], minlength=attributes.sizes[index]).double()
        for number, value in enumerate(attributes.values[name]):
            if counts[number] < MIN_IMAGES or len(z) - counts[number] < MIN_IMAGES:
                skipped[f"{name}={value}"] = f"{int(counts[number])} of {len(z)} images show it"
                continue
            others = counts.clone()
            others[number] = 0
            vector = effects[index][number] - others @ effects[index] / others.sum()
            title = f"{name}.{name_part(value)}"
            if title in directions:
                raise UserError(f"{name}: two of its values would give the name {title}: rename one in the labels")
            unit = f"from the present {name} to {value}"
            directions[title] = Direction(
                title, vector.float().view(z.shape[1:]), DirectionMethod.labels, unit, name, value, model=model
            )
    return list(directions.values()), skipped


def name_part(value: str) -> str:
    """A value as a part of a name that needs no quoting on a command line: "#8a5640" gives "8a5640"."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", value.lstrip("#"))


def pca(z: torch.Tensor, components: int) -> list[Direction]:
    """The first principal components of latents z (N, *latent); strength 1 is one standard deviation."""
    centered = z.flatten(1).double()
    centered = centered - centered.mean(0)
    variances, vectors = top_eigenvectors(centered.T @ centered / (len(z) - 1), components, "components", "pca")
    unit = "one standard deviation"
    total = centered.square().sum() / (len(z) - 1)
    return [
        Direction(f"pca_{i}", (variance.sqrt() * vector).float().view(z.shape[1:]), DirectionMethod.pca, unit,
                  share=float(variance / total))
        for i, (variance, vector) in enumerate(zip(variances, vectors, strict=True), start=1)
    ]  # fmt: skip


def jacobian(
    decode: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor, components: int, advance: Callable[[], None]
) -> list[Direction]:
    """What moves x_hat most: eigenvectors of J'J averaged over latents z (N, *latent), J = d decode / dz.

    Strength 1 moves x_hat by a root mean square of JACOBIAN_RMS to first order. `advance` is called after each latent.
    Raises UserError where a latent is too large.
    """
    size = z[0].numel()
    if size > MAX_LATENT_SIZE:
        raise UserError(
            f"find=[jacobian]: a latent has {size} numbers, more than {MAX_LATENT_SIZE}: use find=[labels,pca]"
        )
    metric = torch.zeros(size, size, dtype=torch.float64)
    pixels = 0
    for latent in z:
        columns = jacobian_columns(decode, latent).double()
        metric += columns @ columns.T / len(z)
        pixels = columns.shape[1]
        advance()
    squared, vectors = top_eigenvectors(metric, components, "components", "jacobian")
    unit = f"x_hat moves by a root mean square of {JACOBIAN_RMS:g} (white - black = 2), to first order"
    return [
        Direction(f"jacobian_{i}", (vector * JACOBIAN_RMS * (pixels / gain).sqrt()).float().view(z.shape[1:]),
                  DirectionMethod.jacobian, unit, share=float(gain / metric.trace()))
        for i, (gain, vector) in enumerate(zip(squared, vectors, strict=True), start=1)
    ]  # fmt: skip


def jacobian_columns(decode: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor, chunk: int = 64) -> torch.Tensor:
    """The columns of the decoder's Jacobian at one latent z (*latent), as rows: (D, C * H * W), on the CPU."""
    tangents = torch.eye(z.numel(), dtype=z.dtype, device=z.device).view(-1, *z.shape)
    columns = []
    for part in tangents.split(chunk):
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention of a CPU has no derivative forwards
            moved = torch.func.jvp(decode, (z.expand_as(part).contiguous(),), (part,))[1]
        columns.append(moved.flatten(1).cpu())
    return torch.cat(columns)


def top_eigenvectors(matrix: torch.Tensor, count: int, setting: str, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest eigenvalues of a symmetric matrix, and their vectors as rows (largest entry positive).

    Raises UserError where there are fewer above 0, and for a matrix that is not finite or has no eigenvalues.
    """
    if not torch.isfinite(matrix).all():
        raise UserError(f"find=[{method}]: {label_regression.NOT_FINITE}")
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        raise UserError(f"find=[{method}]: no directions can be computed here ({fold(error)[:200]})") from None
    values, vectors = values.flip(0)[:count], vectors.T.flip(0)[:count]
    positive = int((values > 1e-10 * values[0].clamp(min=1e-300)).sum())
    if positive < count:
        raise UserError(f"{setting}={count}: {method} finds {positive} of them here: use {positive} or fewer")
    signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    return values, vectors * signs
