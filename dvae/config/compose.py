"""Compose and check the settings of a run. Hydra composes them from recipes/ and the registries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dvae.config.recipe_files import RECIPES, enter_recipe, file_of, read_recipe, recipe_names, recipe_path
from dvae.config.schema import WIDTHS, EmaConfig, EmaProfile, ModelConfig, RunConfig, TrainingConfig
from dvae.errors import UserError, fold, suggest
from dvae.registry.core import broken_plugins_note
from dvae.registry.discovery import RECIPE_FOLDERS, chosen_kinds, load_plugins
from dvae.registry.launchers.base import launcher_of
from dvae.registry.sources.base import SOURCES, StreamSource
from dvae.registry.stages.base import STAGES, run_config_class, training_fields
from dvae.utils.read import read_yaml

RUN_SCHEMA = "run_schema"
"""Name under which recipes/train.yaml includes the fields of a run."""


def compose(config_name: str, words: list[str]) -> DictConfig:
    """Compose a config from recipes/<config_name>.yaml and the words of the command line.

    Raises UserError for an unknown component or recipe, an unknown field, a value of the wrong type, or a plug-in that
    cannot be imported.
    """
    words = [_readable(word) for word in words if word]
    plugins = plugins_of(words)
    load_plugins(plugins)
    words = [f"plugins=[{','.join(plugins)}]" if word.startswith("plugins=") else word for word in words]
    recipes = [path for word in words if (path := file_of(word))]
    try:
        words = [f"recipe={enter_recipe(path)}" if (path := file_of(word)) else word for word in words]
        _import_groups(config_name, words)
        words = [_without_null(word) for word in words]
        return _compose_with_plugins(config_name, words, plugins)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(error, config_name, words)) from None
    except (ValueError, TypeError, AssertionError, RecursionError) as error:
        if not recipes and not RECIPE_FOLDERS:
            raise
        of = f"recipe={recipes[0]}: Hydra cannot read its defaults" if recipes else "a recipe or preset of a plug-in"
        raise UserError(f"{of} ({fold(error)[:200]})") from None


def _compose_with_plugins(config_name: str, words: list[str], imported: list[str]) -> DictConfig:
    """Compose, and import the plug-ins that only the composed config names, such as those of a package's recipe.

    Raises UserError if the config does not name a plug-in that was imported: the run's own processes would lack it.
    """
    composed = _compose(config_name, words)
    named = composed.get("plugins") or []
    if lost := [module for module in imported if module not in named]:
        raise UserError(f"plugins: the recipe needs {lost[0]}, which the other words take away: leave plugins as it is")
    if more := [str(module) for module in named if module not in imported]:
        load_plugins(more)
        _import_groups(config_name, words)
        composed = _compose(config_name, words)
    return composed


def _compose(config_name: str, words: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    if RECIPE_FOLDERS:
        places = ",".join(json.dumps(f"file://{folder}", ensure_ascii=False) for folder in RECIPE_FOLDERS)
        words = [*words, f"hydra.searchpath=[{places}]"]
    with hydra.initialize_config_module("dvae.recipes", version_base="1.3"):
        return hydra.compose(config_name, overrides=words)


def _import_groups(config_name: str, words: list[str]) -> None:
    """Import the components of all kinds that recipes/<config_name>.yaml or the words name.

    Each kind is a config group of Hydra. A component must be imported before Hydra composes, because registering it
    adds its Config to Hydra's ConfigStore.
    """
    defaults = read_yaml(RECIPES / f"{config_name}.yaml")["defaults"]
    if RUN_SCHEMA in defaults:  # it includes the fields that stages add, also the stages of plug-ins
        ConfigStore.instance().store(name=RUN_SCHEMA, node=run_config_class(), provider="dvae")
    groups = {name for entry in defaults if isinstance(entry, dict) for name in entry}
    groups |= {re.split("[=.@]", word.lstrip("+~"))[0] for word in words}
    for kind, registry in chosen_kinds().items():
        if kind in groups:
            registry.import_builtins()


def _without_null(word: str) -> str:
    """Replace `classifier=null` by `~classifier`, which is how Hydra deselects a config group.

    Raises UserError if a run needs a component of this kind.
    """
    kind, _, value = word.partition("=")
    registry = chosen_kinds().get(kind)
    if registry is None or value != "null":
        return word
    if not registry.optional:
        raise UserError(f"{word}: a run needs a {kind}: name one of {', '.join(registry.names())}")
    return f"~{kind}"


def _readable(word: str) -> str:
    """Return the word in a form that Hydra's grammar accepts.

    A value that the grammar rejects, such as a path with spaces or parentheses, is quoted. Raises UserError for a word
    that still cannot be read, such as an incomplete list, mapping or quoted text.
    """
    if not word.lstrip("+~").partition("=")[0]:
        raise UserError(f"{word}: the name of the setting is missing: write key=value")
    if _is_readable(word):
        return word
    key, equals, value = word.partition("=")
    quoted = f"{key}={json.dumps(value, ensure_ascii=False)}"
    if equals and value and value[0] not in "[{'\"" and "${" not in value and _is_readable(quoted):
        return quoted
    raise UserError(
        f"{word}: this cannot be read as key=value: write lists as [a,b], and texts with spaces or special "
        f"characters as {key or 'key'}='\"...\"'"
    )


def _is_readable(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def plugins_of(words: list[str]) -> list[str]:
    """Return the modules that a word `plugins=[...]` names. Without such a word, return those of the user's recipe.

    They must be imported before Hydra composes, because they register components. Raises UserError for a word that
    Hydra does not understand, and for a recipe that cannot be read.
    """
    for word in words:
        if word.startswith(("plugins=", "+plugins=", "++plugins=")):
            try:
                value = OverridesParser.create().parse_override(word).value()
            except HydraException as error:
                raise UserError(f"{word}: {fold(error)}") from None
            return _module_names(value)
    for path in list(filter(None, map(file_of, words)))[-1:]:  # Hydra takes the last recipe too
        return _module_names(read_recipe(path).get("plugins"))
    return []


def _module_names(value: Any) -> list[str]:
    """Return the names in a value of the setting `plugins`: a list, one name, or nothing."""
    names = value if isinstance(value, list) else [value]
    return [str(name) for name in names if name not in (None, "")]


def _explain(error: Exception, config_name: str, words: list[str]) -> str:
    """Turn an error of Hydra or OmegaConf into one line: what is wrong, the value, and what to do."""
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file or "").rpartition("/")
        if group == "recipe" and Path(f"{name}.yaml").is_file():
            return f"unknown recipe {name!r}: did you mean the file? write recipe={name}.yaml"
        options = error.options or (recipe_names() if group == "recipe" else [])
        return f"unknown {group or 'config'} {name!r}: {suggest(name, options)}{broken_plugins_note()}"
    if in_file := re.match(r"In '([^']+)': \w+ raised while composing config:\n(.*)\n\s+full_key: (\S*)", str(error)):
        file, reason, name = in_file.groups()
        if reason.startswith("Key '"):
            beside = _fields_beside(name)
            known = suggest(name.rpartition(".")[2], beside) if beside else "`python tools/components.py` lists fields"
            reason = f"unknown field {name!r}: {known}"
        return f"{recipe_path(file) or f'recipes/{file}.yaml'}: {fold(reason)}"
    cause = error.__cause__ or error
    key = re.search(r"Could not override '([^']+)'", str(error))
    misspelled = isinstance(cause, (ConfigKeyError, ConfigAttributeError)) or key is not None
    if misspelled and (name := key.group(1) if key else str(getattr(cause, "full_key", ""))):
        siblings = _siblings(name, config_name, words)
        if siblings or config_name != "train":
            return f"unknown field {name!r}: {suggest(name.rpartition('.')[2], siblings)}"
        top = name.partition(".")[0]
        known = suggest(top, [field.name for field in fields(run_config_class())])
        return f"unknown field {name!r}: {known}{_plugin_hint(top)}"
    word = re.search(r"Error merging override (\S+)", str(error))
    reason = str(cause).split("\n", maxsplit=1)[0]
    if variable := re.search(r"Environment variable '(\w+)' not found", reason):
        return unset(variable.group(1))
    return f"{word.group(1) if word else 'config'}: {fold(reason)}"


def unset(variable: str) -> str:
    """Return the message about an environment variable that a setting refers to and that is not set."""
    return f"the settings need the environment variable {variable}, which is not set: export it, then run this again"


def _siblings(name: str, config_name: str, words: list[str]) -> list[str]:
    """Return the fields beside `name`, in the config that the other words compose."""
    parent = name.rpartition(".")[0]
    rest = [word for word in words if word.lstrip("+~").split("=", 1)[0] != name]
    try:
        config = _compose(config_name, rest)
    except (HydraException, OmegaConfBaseException):
        return []  # another word is wrong too: the message is still correct, but suggests no names
    node = OmegaConf.select(config, parent) if parent else config
    return [str(key) for key in node] if isinstance(node, DictConfig) else []


def _fields_beside(name: str) -> list[str]:
    """Return the fields beside `name` in the settings of a run. Fields of components are unknown here."""
    node: Any = OmegaConf.structured(run_config_class())
    parent = name.rpartition(".")[0]
    node = OmegaConf.select(node, parent) if parent else node
    return [str(key) for key in node] if isinstance(node, DictConfig) else []


def tool_settings(composed: DictConfig) -> Any:
    """Turn the composed config of a tool into its dataclass.

    Raises UserError if a required setting is missing or has the wrong type.
    """
    if missing := sorted(_missing("", OmegaConf.to_container(composed))):
        raise UserError(f"not set: {', '.join(missing)}; add {' '.join(f'{key}=...' for key in missing)}")
    try:
        return OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise mistyped(error) from None


def _missing(prefix: str, plain: Any) -> Iterator[str]:
    """Yield the full keys of the settings that are not set.

    `plain` must not be resolved: a setting that only refers to a missing one must not be reported too.
    """
    for key, value in plain.items():
        if isinstance(value, dict):
            yield from _missing(f"{prefix}{key}.", value)
        elif value == MISSING:
            yield f"{prefix}{key}"


def to_run_config(config: Any) -> RunConfig:
    """Turn a composed config, or the content of config.yaml, into a RunConfig, and check it.

    Each component gets its typed Config. Raises UserError for a missing or unknown field, a value of the wrong type, or
    a setting that `check_config` rejects.
    """
    try:
        merged: Any = OmegaConf.merge(OmegaConf.structured(run_config_class()), config)
        missing = [str(key) for key in OmegaConf.missing_keys(merged)]
        if missing:
            words = " ".join(f"{key}=..." for key in sorted(missing))
            raise UserError(f"not set: {', '.join(sorted(missing))}; add {words} or choose a recipe that does")
        # Resolve now: `run` or `classes` may refer to the components, which are removed from `merged` below.
        OmegaConf.resolve(merged)
        components = {
            kind: None if registry.optional and merged[kind] is None else registry.config(merged[kind])
            for kind, registry in chosen_kinds().items()
        }
        for kind in components:
            # The typed Configs were built above. For an unknown field, to_object would not say which one it is.
            merged[kind] = None
        result: Any = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        known = suggest(str(error.key), _fields(error.parent_node))
        raise UserError(f"unknown field {error.full_key!r}: {known}{_plugin_hint(str(error.full_key))}") from None
    except OmegaConfBaseException as error:
        if variable := re.search(r"Environment variable '(\w+)' not found", str(error)):
            raise UserError(unset(variable.group(1))) from None
        raise UserError(f"{error.full_key}: {fold(str(error.msg or error).splitlines()[0])}") from None
    for kind, component in components.items():
        setattr(result, kind, component)
    return check_config(result)


def _plugin_hint(name: str) -> str:
    """Return a hint for an unknown field at the top level, because the stage of a plug-in may define it."""
    hint = "; if a stage of a plug-in defines it, install the plug-in, or add plugins=[MODULE]"
    return "" if "." in name else hint + broken_plugins_note()


def _fields(node: Any) -> list[str]:
    kind = OmegaConf.get_type(node) if node is not None else run_config_class()
    return [f.name for f in fields(kind)] if isinstance(kind, type) and is_dataclass(kind) else []


def check_config(config: RunConfig) -> RunConfig:
    """Check the settings of a run, without building models or reading data, and return them.

    Raises UserError for the first setting that cannot work.
    """
    stages = [STAGES.get(name)(config) for name in STAGES.order(config.stages)]
    if uses_stream(config):
        shards = [stage.name for stage in stages if not stage.takes_streams]
        if shards:
            raise UserError(f"stages: {shards[0]} needs shards, but an endless source has none: use [refiner,evaluate]")
    elif config.channels not in (1, 3):
        raise UserError(f"channels={config.channels}: images have 1 or 3 channels")
    elif config.image_size < 4:
        raise UserError(f"image_size={config.image_size}: use 4 or more")
    check_classes(config)
    for stage in stages:
        stage.check_settings()
    launcher_of(config.launcher)  # building the launcher checks its settings
    if not config.max_hours >= 0:
        raise UserError(f"max_hours={config.max_hours:g}: use 0 (no limit) or more")
    for name in training_fields():
        training: TrainingConfig = getattr(config, name)
        for key in ("steps", "batch", "micro_batches", "log_every", "save_every", "keep"):
            if getattr(training, key) < 1:
                raise UserError(f"{name}.{key}={getattr(training, key)}: use 1 or more")
        if training.nonfinite_skips < 0:
            raise UserError(f"{name}.nonfinite_skips={training.nonfinite_skips}: use 0 or more")
        if training.zero_stage not in range(4):
            raise UserError(f"{name}.zero_stage={training.zero_stage}: use 0, 1, 2 or 3")
        if training.lr <= 0:
            raise UserError(f"{name}.lr={training.lr}: use a learning rate above 0")
        check_ema(f"{name}.ema", training.ema)
    if config.evaluate.every_steps < 0:
        raise UserError(f"evaluate.every_steps={config.evaluate.every_steps}: use 0 (none) or a number of steps")
    images = (config.evaluate.metrics or config.evaluate.every_steps) and not uses_stream(config)
    if images and config.evaluate.kid_subset_size > config.evaluate.n:
        raise UserError(
            f"evaluate.kid_subset_size={config.evaluate.kid_subset_size} is more than evaluate.n={config.evaluate.n}: "
            "use a smaller subset"
        )
    return config


def check_ema(name: str, ema: EmaConfig) -> None:
    """Raise UserError for invalid EMA settings, and for snapshots from which no average can be reconstructed.

    `name` is the name of these settings in messages, such as "train_refiner.ema".
    """
    for key, widths in (("width", [ema.width]), ("extra_widths", ema.extra_widths)):
        for width in widths:
            if not WIDTHS[0] <= width <= WIDTHS[1]:
                raise UserError(f"{name}.{key}={width:g}: use {WIDTHS[0]} to {WIDTHS[1]}")
    for key, decays in (("decay", [ema.decay]), ("extra_decays", ema.extra_decays)):
        for decay in decays:
            if not 0 <= decay < 1:
                raise UserError(f"{name}.{key}={decay:g}: use 0 or more, and less than 1")
    power = ema.profile is EmaProfile.power
    for key, kept in (
        ("extra_widths", [*([ema.width] if power else []), *ema.extra_widths]),
        ("extra_decays", [*([] if power else [ema.decay]), *ema.extra_decays]),
    ):
        twice = [value for value in kept if kept.count(value) > 1]
        if twice:
            raise UserError(f"{name}.{key}: there is another average of {twice[0]:g}: name each once")
    if ema.snapshot_every < 0:
        raise UserError(f"{name}.snapshot_every={ema.snapshot_every}: use 0 (none) or more")
    if ema.snapshot_every and power + len(ema.extra_widths) < 2 and not ema.extra_decays:
        raise UserError(
            f"{name}.snapshot_every={ema.snapshot_every} needs two averages of power profile: "
            f"add {name}.extra_widths=[0.05,0.1]"
        )


def check_classes(config: RunConfig) -> None:
    """Raise UserError if `classes`, data.label and the classifier are inconsistent."""
    twice = sorted({name for name in config.classes if config.classes.count(name) > 1})
    if twice:
        raise UserError(f"classes: {twice[0]!r} occurs more than once: name each class once")
    if config.classes and not config.data.label and not uses_stream(config):
        raise UserError("classes need the name of the image attribute that holds the class: set data.label=NAME")
    if config.data.label and not config.classes:
        raise UserError(f"data.label={config.data.label} needs the list of its values: set classes=[...]")
    if config.classifier is not None and len(config.classes) < 2:
        raise UserError(f"classifier={config.classifier.name} needs two or more classes: set classes=[...]")


def uses_stream(config: RunConfig) -> bool:
    """Return whether the source is endless. Such a source has neither shards nor held-out images."""
    return issubclass(SOURCES.get(config.source.name), StreamSource)


def refuse_points(config: ModelConfig, run: str) -> None:
    """Raise UserError if the trained run generates points instead of images."""
    if config.draws_points:
        raise UserError(f"run={run} draws points, not images: use python tools/gallery.py runs={run}")


def mistyped(error: OmegaConfBaseException) -> UserError:
    """Turn the error about a tool's field with a wrong value into one line."""
    return UserError(f"{error.full_key}: {fold(str(error.msg or error).splitlines()[0])}")
