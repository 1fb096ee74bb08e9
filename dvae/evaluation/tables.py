"""Format results as Markdown tables: one result, a study, or several results whose protocols agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dvae.errors import UserError
from dvae.evaluation.protocol import EvaluationProtocol, compare
from dvae.evaluation.results import COUNTS, LIMIT, check_result
from dvae.utils.read import DamagedFile, parse_json, read_bytes
from dvae.utils.text_tables import markdown_table


def names(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all metrics in the sets of the results, in the order of their first occurrence."""
    found = [name for result in results for figures in result["sets"].values() for name in figures]
    return [name for name in dict.fromkeys(found) if name not in COUNTS]


def cell(figures: Mapping[str, Any], name: str) -> str:
    """The mean of a metric, with its standard error if it has one. Empty if the metric was not computed."""
    if name not in figures:
        return ""
    value = figures[name]
    return f"{value['mean']:.5g}" + ("" if value["se"] is None else f" ± {value['se']:.2g}")


def of_result(result: Mapping[str, Any]) -> str:
    """A table of one result, with a row for each set and each floor."""
    figures, sets = names([result]), dict(result["sets"])
    sets |= {f"floor: {name}, n={found['n']}": found for name, found in result["floor"].items()}
    return markdown_table(
        ["set", *figures], [[name, *(cell(found, f) for f in figures)] for name, found in sets.items()]
    )


def of_study(results: Sequence[Mapping[str, Any]], varied: str) -> str:
    """A table of a study, with a row for each set of each point, and a row for each floor.

    `varied` is the quantity in which the points differ: nfe, or a key of the protocol's `made`.
    """
    figures = names(results)
    rows = []
    for result in results:
        protocol = result["protocol"]
        value = protocol["nfe"] if varied == "nfe" else protocol["made"].get(varied)
        by = f"{value:g}" if isinstance(value, int | float) else "-"
        for name, found in result["sets"].items():
            sampler = f"{protocol['sampler'].get('name', '-')}, {protocol['sampler'].get('steps', '-')} steps"
            rows.append([name, sampler, by, *(cell(found, figure) for figure in figures)])
    for name, found in results[0]["floor"].items():
        rows.append([f"floor: {name}, n={found['n']}", "", "", *(cell(found, figure) for figure in figures)])
    return markdown_table(["set", "sampler", varied, *figures], rows)


def comparison(paths: Sequence[str]) -> str:
    """One table of several results, from files of tools/evaluate.py or from the summary.json of runs.

    Raises UserError if a file cannot be read. Also raises it if the protocol of a result differs from the first one in
    a field that matters; the message names the field.
    """
    if len(paths) < 2:
        raise UserError(f"compare={list(paths)}: name two results or more")
    results = {path: read(path) for path in paths}
    first = paths[0]
    protocols = {path: EvaluationProtocol.read(result["protocol"]) for path, result in results.items()}
    for path in paths[1:]:
        try:
            compare(protocols[first], protocols[path])
        except UserError as error:
            raise UserError(f"{first} and {path}: {error}") from None
    figures = names(list(results.values()))
    rows = []
    for path, result in results.items():
        protocol = protocols[path]
        sampler = ", ".join(f"{protocol.sampler[k]}" for k in ("name", "steps") if k in protocol.sampler)
        for name, found in result["sets"].items():
            rows.append([path, name, sampler, f"{protocol.nfe:g}", *(cell(found, figure) for figure in figures)])
    for name, found in results[first]["floor"].items():
        rows.append([first, f"floor: {name}, n={found['n']}", "", "", *(cell(found, figure) for figure in figures)])
    return markdown_table(["result", "set", "sampler", "NFE", *figures], rows)


def read(path: str) -> dict[str, Any]:
    """Read a result from a file, or from a run's summary.json. Raises UserError if the file holds none."""
    ask = "name results of tools/evaluate.py"
    try:
        found = parse_json(read_bytes(path, LIMIT), path)
        result = found.get("evaluation", found) if isinstance(found, dict) else {}
        if not isinstance(result, dict) or not {"protocol", "sets", "floor"} <= set(result):
            raise UserError(f"compare: {path} holds no result with a protocol: {ask}")
        return check_result(result, path)
    except OSError as error:
        raise UserError(f"compare: {path} cannot be read ({error.strerror})") from None
    except DamagedFile as error:
        raise UserError(f"compare: {error}: {ask}") from None
