"""A study of two arms of a tiny recipe: real trainings, real scores; and its report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tests_support import Tool

from dvae.config import compose
from dvae.config.recipe_files import recipe_names
from dvae.diffusion.denoiser import Center
from dvae.errors import UserError
from dvae.experiments.study import equivalence, study_report, study_runs, study_spec
from dvae.experiments.study.study_spec import StudyConfig
from dvae.inference.pipeline import Pipeline
from dvae.models import bundle, bundle_export, components
from dvae.registry.stages.base import STAGES
from dvae.runs.folder import Run


def settings(**changed: object) -> StudyConfig:
    return StudyConfig(**({"arms": {"a": [], "b": []}} | changed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"arms": {}}, "names nothing to compare"),
        ({"arms": {"A b": [], "a-b": []}}, "give the same folder"),
        ({"arms": {"Generator": []}}, "give the same folder, or one is 'generator'"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\]: give one or more, each once"),
        ({"arms": {"a": ["teacher=b"], "b": []}}, "arm 'a': teacher=b is not an earlier arm"),
        ({"steps": []}, "steps="),
        ({"steps": [0, 5]}, "use 1 or more"),
        ({"n": 50}, "n=50 is less than kid_subset_size=100"),
    ],
)
def test_what_cannot_be_compared_is_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        study_spec.check(settings(**changed))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study=avatar"], "study=avatar: did you mean 'avatars'?"),
        (["study=none.yaml"], "study=none.yaml: no such file"),
        (["seed=[1]"], "seed=[1]: did you mean 'seeds'?"),
        (["n=many"], "n: Value 'many' of type 'str' could not be converted to Integer"),
    ],
)
def test_words_that_mean_nothing_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        study_spec.read_study(words)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", recipe_names("study"))
def test_the_studies_that_are_shipped(name: str) -> None:
    settings = study_spec.read_study([f"study={name}", "seeds=[4]", "steps=[3]"])
    assert (settings.seeds, settings.steps) == ([4], [3])
    for arm in settings.arms:
        stages = ",".join(study_spec.arm_stages(settings, arm))
        words = [
            f"recipe={settings.recipe}",
            *settings.overrides,
            f"stages=[{stages}]",
            *study_spec.arm_overrides(settings, arm, 4),
        ]
        found = compose.to_run_config(compose.compose("train", words))
        assert components.build_models_on_meta(found).has_generator
        assert set(stages.split(",")) <= set(STAGES.names())


def test_the_words_of_arms() -> None:
    arms = {"one": [], "two": ["stages=[shards,joint,prior]", "seed=9"], "three": ["stages=[distil]", "teacher=one"]}
    found = settings(arms=arms, out="o")
    assert study_spec.arm_stages(found, "one") == ("shards", "encoder", "prior", "refiner")
    assert study_spec.arm_overrides(found, "one", 5) == [
        "seed=5",
        "data.shards=o/shards",
        "encoder_weights=o/seed-5/generator",
    ]
    assert study_spec.arm_stages(found, "two") == ("shards", "joint", "prior")
    assert study_spec.arm_overrides(found, "two", 5) == ["seed=5", "data.shards=o/shards", "seed=9"]
    assert study_spec.arm_stages(found, "three") == ("distil",)
    assert study_spec.arm_overrides(found, "three", 5) == ["seed=5", "data.shards=o/shards", "teacher=o/seed-5/one"]


def test_the_report_names_the_samplers_of_the_arms() -> None:
    def point(name: str, nfe: float) -> dict[str, object]:
        return {"protocol": {"sampler": {"name": name}, "nfe": nfe}}

    points: study_runs.StudyPoints = {study_runs.VAE: {0: {}}, "a": {4: point("ddim", 4)}, "b": {4: point("ddim", 4)}}
    assert study_report.samplers(points) == "sampler ddim, 1 evaluation per step"
    points["b"] = {2: point("heun", 3), 4: point("heun", 6)}
    assert (
        study_report.samplers(points)
        == "a: sampler ddim, 1 evaluation per step; b: sampler heun, 1.5 evaluations per step"
    )


def test_a_folder_is_one_study(tmp_path: Path) -> None:
    out = str(tmp_path / "study")
    study_runs.claim_folder(settings(out=out))
    study_runs.claim_folder(settings(out=out, seeds=[0, 1, 2, 3], steps=[7]))  # may be added
    study_runs.claim_folder(settings(out=out, arms={"b": [], "c": ["seed=1"]}))
    study_runs.claim_folder(settings(out=out))
    with pytest.raises(UserError, match=r"is a study with arms=.*'c'.*, not .*: use another out="):
        study_runs.claim_folder(settings(out=out, arms={"c": []}))
    with pytest.raises(UserError, match="is a study with n=500, not 600: use another out="):
        study_runs.claim_folder(settings(out=out, n=600))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists and is not a study"):
        study_runs.claim_folder(settings(out=str(tmp_path / "other")))


def test_the_table_has_errors_over_seeds() -> None:
    kid = {"mean": 0.0213, "se": 0.00124}
    assert study_report.format_kid(kid) == "21.3 ± 1.2"
    assert study_report.format_kid(kid | {"se": None}) == "21.3"
    sets = {name: {5: {"sets": {name: {study_report.KID: kid}}}} for name in ("a", "b")}
    points: study_runs.StudyPoints = {
        study_runs.VAE: {0: {"sets": {study_runs.VAE: {study_report.KID: kid | {"mean": 0.3}}}}},
        **sets,
    }
    rows = study_report.kid_table(
        settings(steps=[5]), points, {"heldout": {study_report.KID: kid | {"mean": 0.0}}}
    ).splitlines()
    assert rows[2:] == [
        "| a                      | 21.3 ± 1.2  |", "| b                      | 21.3 ± 1.2  |",
        "| VAE alone (no refiner) | 300.0 ± 1.2 |", "| floor: heldout         | 0.0 ± 1.2   |",
    ]  # fmt: skip


@pytest.mark.parametrize("image", [True, False])
def test_formulation_2_draws_the_same_images(tiny: list[str], tmp_path: Path, image: bool) -> None:
    words = [*tiny, "denoiser.center=none", "denoiser.data_scale=1", f"denoiser.condition_image={image}"]
    composed = compose.compose("train", words)
    made = components.build_models(compose.to_run_config(composed))
    with torch.no_grad():
        made.denoiser.refiner.out[2].weight.normal_(std=0.02)  # it starts at zero
    parts = {name: part.state_dict() for name, part in made.trained_parts().items()}
    bundle_export.export(tmp_path / "bundle", compose.to_run_config(composed), parts)
    if not image:
        with pytest.raises(UserError, match="is not of formulation 1"):
            equivalence.compare_formulations(tmp_path / "bundle", 3, 0)
        return
    assert equivalence.compare_formulations(tmp_path / "bundle", 3, 0).gray_levels <= 1
    loaded, made = bundle.load(tmp_path / "bundle")
    first = Pipeline(loaded, made).generate(4, 0)[1].int()
    made.denoiser.config = replace(loaded.denoiser, center=Center.input)  # in its coordinates they are another function
    assert (first - Pipeline(loaded, made).generate(4, 0)[1].int()).abs().max() > 1


@pytest.mark.slow
def test_two_arms(tool: Tool, tiny: list[str], tmp_path: Path) -> None:
    words = [word for word in tiny if not word.startswith(("recipe=", "evaluate."))]
    words += ["denoiser.center=none", "denoiser.data_scale=1"]
    study = {
        "recipe": "demo", "overrides": words, "seeds": [3], "steps": [1, 2], "n": 20, "n_reference": 40,
        "kid_subset_size": 8, "kid_subsets": 4,
        "arms": {"without": ["denoiser.condition_image=false", "denoiser.condition_latent=false"], "with x_hat": []},
    }  # fmt: skip
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    first = tool("study", "study=two.yaml", "out=study")
    assert first.returncode == 0, first.stderr
    out = tmp_path / "study"
    assert first.stdout.splitlines()[-1] == "study/study.md and study.png"
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.stdout.splitlines() if line[:1] == "|"]
    assert [row[0] for row in table[2:5]] == ["without", "with x_hat", "VAE alone (no refiner)"]

    points = {path.name: json.loads(path.read_text()) for path in (out / "points").iterdir()}
    assert sorted(points) == [
        "vae-alone-0000.json", "with-x-hat-0001.json", "with-x-hat-0002.json", "without-0001.json", "without-0002.json"
    ]  # fmt: skip
    assert [points[f"without-000{steps}.json"]["protocol"]["nfe"] for steps in (1, 2)] == [1, 2]
    assert len({point["protocol"]["reference_sha256"] for point in points.values()}) == 1

    weights = [out / f"seed-3/{arm}/weights/encoder.safetensors" for arm in ("generator", "without", "with-x-hat")]
    assert len({path.read_bytes() for path in weights}) == 1
    assert "steps" not in Run(out / "seed-3" / "without").records()["encoder"]
    assert "Formulation 2 with the same weights" in (out / "study.md").read_text()
    assert (out / "study.png").read_bytes()[:4] == b"\x89PNG"

    (out / "points" / "with-x-hat-0002.json").unlink()
    again = tool("study", "study=two.yaml", "out=study")  # trains nothing, scores that point alone
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-len(table) - 1 :] == first.stdout.splitlines()[-len(table) - 1 :]
    refused = tool("study", "study=two.yaml", "out=study", "n=30")
    assert refused.returncode == 2
    assert refused.stderr.strip().endswith("is a study with n=20, not 30: use another out=")
