from dataclasses import asdict, fields, replace

import pytest

from dvae.errors import UserError
from dvae.evaluation.protocol import EvaluationProtocol, compare

PROTOCOL = EvaluationProtocol(
    backend="torch-fidelity 0.4.0",
    extractor="efficientnet-lite0",
    weights_sha256="ab",
    resize="bilinear",
    image_size=32,
    n=1000,
    reference_split="train",
    n_reference=5000,
    reference_sha256="cd",
    seeds=[0, 1, 2],
    kid_subset_size=100,
    kid_subsets=100,
    kid_seed=2020,
    sampler={"name": "ddim", "steps": 50},
    nfe=50,
    packages={"torch": "2.14.1"},
    prc_neighborhood=3,
    isc_splits=10,
)
MUTABLE_FIELDS = {"sampler", "nfe", "packages", "made", "batch", "threads"}


@pytest.mark.parametrize("name", [f.name for f in fields(EvaluationProtocol) if f.name not in MUTABLE_FIELDS])
def test_results_of_two_protocols_are_refused(name):
    value = getattr(PROTOCOL, name)
    other = replace(PROTOCOL, **{name: [7] if isinstance(value, list) else value * 2})
    with pytest.raises(UserError, match=f"cannot be compared: {name} is"):
        compare(PROTOCOL, other)


def test_how_images_were_made_is_what_one_compares():
    other = replace(PROTOCOL, sampler={"name": "ddpm"}, nfe=1000, packages={}, made={"noise": 0.1}, batch=1, threads=2)
    compare(PROTOCOL, other)


def test_the_setting_of_a_metric_that_was_not_computed_decides_nothing():
    compare(PROTOCOL, replace(PROTOCOL, kid_subset_size=None, kid_subsets=None, prc_neighborhood=None))


def test_read_back_from_json():
    record = asdict(PROTOCOL)
    assert EvaluationProtocol.read(record) == PROTOCOL
    with pytest.raises(UserError, match="field 'n' is missing"):
        EvaluationProtocol.read({key: value for key, value in record.items() if key != "n"})
    with pytest.raises(UserError, match="field 'color' is unknown"):
        EvaluationProtocol.read({**record, "color": 1})
