"""Find directions of a latent space with three methods: labels, principal components, the decoder's Jacobian.

All computations are in float64. Vectors are returned in fp32, in the shape of one latent.
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
"""Minimum number of images that show a value, and of images that do not, for a direction to this value."""
JACOBIAN_RMS = 0.1
"""Root mean square change of x_hat, over images and pixels and to first order, at strength 1 of a direction of method
jacobian. On this scale white - black is 2."""
MAX_LATENT_SIZE = 4096
"""Maximum size of a latent for method jacobian. The computation needs a matrix of this height and width."""


def from_labels(
    z: torch.Tensor, codes: torch.Tensor, attributes: LabeledAttributes, names: Iterable[str]
) -> tuple[list[Direction], dict[str, str]]:
    """Find a direction to each value of the attributes `names`.

    Strength 1 subtracts what the present value adds to a latent and adds what the new value adds (see LabelModel). The
    stored vector is the mean of this change: the displacement from images without the value to images with it, if all
    other attributes are equal.

    Args:
        z: latents (N, *latent).
        codes: indices of the values, (N, A). They cover all attributes, so that the regression can separate correlated
            attributes.
        attributes: all attributes.
        names: attributes to find directions for.

    Returns the directions, and the reason for each skipped value "NAME=VALUE". Raises UserError if two values would
    give the same name.
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
    """Convert a value to a part of a name that needs no quotes on a command line: "#8a5640" becomes "8a5640"."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", value.lstrip("#"))


def pca(z: torch.Tensor, components: int) -> list[Direction]:
    """Find the first principal components of latents z (N, *latent). Strength 1 is one standard deviation.

    Raises UserError if the latents have fewer components.
    """
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
    """Find the directions that change x_hat most.

    They are the eigenvectors of J^T J, averaged over latents z (N, *latent), with J = d decode / dz. Strength 1 changes
    x_hat by a root mean square of JACOBIAN_RMS to first order. `advance` is called after each latent.

    Raises UserError if a latent has more than MAX_LATENT_SIZE numbers, or if there are fewer directions.
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
    """Return the columns of the decoder's Jacobian at one latent z (*latent), as rows, (D, C * H * W), on the CPU.

    `chunk` columns are computed per call of the decoder.
    """
    tangents = torch.eye(z.numel(), dtype=z.dtype, device=z.device).view(-1, *z.shape)
    columns = []
    for part in tangents.split(chunk):
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention of a CPU has no forward-mode derivative
            moved = torch.func.jvp(decode, (z.expand_as(part).contiguous(),), (part,))[1]
        columns.append(moved.flatten(1).cpu())
    return torch.cat(columns)


def top_eigenvectors(matrix: torch.Tensor, count: int, setting: str, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` largest eigenvalues of a symmetric matrix and their eigenvectors as rows.

    The sign of each vector is chosen so that its largest entry is positive.

    Raises UserError if fewer than `count` eigenvalues are positive, if the matrix is not finite, or if the computation
    does not converge.
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
    # an eigenvector has an arbitrary sign: fix it, so that the result is reproducible
    signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    return values, vectors * signs
