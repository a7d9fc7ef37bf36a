"""``qmemtune inspect``: how a run's queryable memory uses its atoms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qmemtune.cli.options import Debug, Json, Overrides, Quiet
from qmemtune.cli.output import NO_PICTURE, Output, output, plain
from qmemtune.cli.target import load_target, with_run_dir
from qmemtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from qmemtune.rundir import RunDir

SHADES = " ·░▒▓█"
"""From no weight to twice an even share and more."""
SHOWN_INSTRUCTIONS = 12


def inspect(
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Look at so many held-out rows, evenly spread.")] = 256,
    as_json: Json = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Show how a run's queryable memory uses its atoms: by block, by group of rows, by token.

    inspect RUN or run_dir=RUN, else the newest run. Writes inspect.json and inspect.png into the run folder.
    data.group_by=COLUMN names the groups; data.path= and data.eval_path= take other rows.
    """
    with output(as_json, debug, quiet) as out:
        report = _inspect(with_run_dir(overrides or []), rows, out)
        out.result(report, lambda console: _show(console, report))


def _inspect(overrides: Sequence[str], limit: int, out: Output) -> dict[str, Any]:
    from qmemtune.config.adapters import QueryableConfig
    from qmemtune.config.regression import is_regression

    run, composed = load_target(overrides, out)
    config = composed.config
    if config.adapter.kind != "queryable":
        raise UserError(
            f"the run's adapter is {config.adapter.kind}, which has no memory to look into",
            where=str(run.path),
            fix="inspect a run that was trained with adapter=queryable",
        )
    if isinstance(config.adapter, QueryableConfig) and config.adapter.generated_core:
        raise UserError(
            "the run's cores are generated (adapter.generated_core), so that it has no routes to look at",
            where=str(run.path),
            fix="inspect a run with adapter.generated_core=false",
        )
    if is_regression(config):
        raise UserError(
            "the run is a regression, which has no tokens to look at",
            where=str(run.path),
            fix="inspect a run of a language model",
        )
    out.working("loading the run's model")
    from qmemtune.cli.display import RowCounter
    from qmemtune.data.prepare import prepare_heldout
    from qmemtune.engine.restore import load_run
    from qmemtune.evaluation.routes import inspect_routes
    from qmemtune.evaluation.samples import evenly_spaced
    from qmemtune.rundir import write_json

    out.libraries_are_loaded()
    loaded = load_run(run, config)
    chosen = evenly_spaced(prepare_heldout(config.data, loaded.tokenizer).heldout, limit)
    if not chosen:
        raise UserError(
            "there are no held-out rows to look at",
            where="data.eval_path",
            fix="give data.eval_path, or a data.eval_fraction above 0",
        )
    with RowCounter(quiet=out.quiet) as counter:
        report = inspect_routes(
            loaded.model,
            loaded.tokenizer,
            chosen,
            source=loaded.source,
            has_prior=loaded.source.active,
            device=loaded.device,
            dtype=loaded.dtype,
            batch_size=config.evaluation.per_device_eval_batch_size,
            progress=counter,
        )
    # Rows of several sets are grouped by set.
    group_by = config.data.group_by or ("data.sources" if config.data.sources else None)
    report = {"run_dir": str(run.path), "group_by": group_by, **report}
    report["picture"] = _draw(report, run, out)
    report["json"] = str(run.inspection)
    write_json(run.inspection, plain(report))
    return report


def _draw(report: dict[str, Any], run: RunDir, out: Output) -> str | None:
    from qmemtune.report.routes import draw_routes

    try:
        draw_routes(report, run.inspection_picture)
    except ImportError:
        out.note(NO_PICTURE)
        return None
    return str(run.inspection_picture)


def _show(console: Console, report: dict[str, Any]) -> None:
    console.print(
        f"{report['run_dir']}: routes of {report['tokens']:,} tokens in {report['rows']} held-out rows",
        style="bold",
        markup=False,
    )
    for table in (_blocks(report), _atoms(report), _groups(report), _tokens(report)):
        if table is not None:
            console.print("")
            console.print(table)
    console.print("")
    _show_clustering(console, report)
    dead = report["dead_atoms"]
    console.print(f"dead atoms: {', '.join(map(str, dead)) if dead else 'none'}", markup=False)
    if report["collapse"]:
        console.print(report["collapse"], style="bold red", markup=False)
    written = [path for path in (report["json"], report["picture"]) if path]
    console.print(f"written: {', '.join(written)}", style="dim", markup=False)


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _blocks(report: dict[str, Any]) -> Table:
    from qmemtune.report.routes import layer_range

    title = "blocks: mean weight of each atom (█: twice an even share)"
    table = _table(title, "block", "layers", "entropy", "effective atoms")
    # A blank stands for no weight: broken or shortened, the row says something else.
    table.add_column("atoms 0, 1, ...", no_wrap=True, min_width=len(report["blocks"][0]["use"]))
    table.add_column("strongest")
    for block in report["blocks"]:
        table.add_row(
            str(block["block"]),
            layer_range(block["layers"]),
            f"{block['entropy']:.3f}",
            f"{block['effective_atoms']:.1f}",
            _shades(block["use"]),
            _strongest(block["use"]),
        )
    return table


def _atoms(report: dict[str, Any]) -> Table:
    table = _table("atoms", "atom", "weight", "core norm", "key norm", "most alike core")
    for atom in report["atoms"]:
        alike = f"{atom['nearest_atom']} ({atom['nearest_similarity']:+.2f})" if "nearest_atom" in atom else ""
        table.add_row(
            str(atom["atom"]), f"{atom['use']:.1%}", f"{atom['core_norm']:.3f}", f"{atom['key_norm']:.2f}", alike
        )
    return table


def _groups(report: dict[str, Any]) -> Table | None:
    from rich.text import Text

    from qmemtune.report.routes import mean_over_blocks

    if not report["groups"]:
        return None
    table = _table(f"groups ({report['group_by']}), mean over blocks", "group", "rows")
    table.add_column("atoms 0, 1, ...", no_wrap=True, min_width=len(report["blocks"][0]["use"]))
    table.add_column("strongest")
    for name, group in report["groups"].items():
        use = mean_over_blocks(group["use"])
        table.add_row(Text(name), str(group["rows"]), _shades(use), _strongest(use))
    return table


def _tokens(report: dict[str, Any]) -> Table:
    from rich.text import Text

    table = _table("tokens with the sharpest routes", "token", "count", "entropy", "block", "atom", "weight")
    for token in report["sharpest_tokens"]:
        table.add_row(
            Text(repr(token["token"])),
            str(token["count"]),
            f"{token['entropy']:.3f}",
            str(token["block"]),
            str(token["atom"]),
            f"{token['weight']:.1%}",
        )
    return table


def _show_clustering(console: Console, report: dict[str, Any]) -> None:
    if "clustering" not in report:
        console.print("groups: none (data.group_by=COLUMN compares kinds of rows)", markup=False)
        return
    for kind, found in report["clustering"].items():
        # Without a prior there is one kind, and nothing that it is without.
        name = kind.replace("_", " ") if len(report["clustering"]) > 1 else "groups"
        nearest = found["nearest_group"]
        share = "" if nearest is None else f"; {nearest:.0%} of rows route nearest to their own group"
        console.print(
            f"{name}: mutual information of group and atom {found['mutual_information']:.4f} nats "
            f"(chance {found['chance']:.4f}){share}",
            markup=False,
        )
        wordings = report["instructions"][kind]
        if wordings["nearest_group"] is not None:
            count = len(wordings["wordings"])
            console.print(
                f"  of {count} wordings of an instruction {wordings['closer_group']:.0%} route closer to the other "
                f"wordings of their own group than to other groups on average, {wordings['nearest_group']:.0%} nearest",
                markup=False,
            )
            wrong = [w for w in wordings["wordings"] if w["nearest"] != w["group"]][:SHOWN_INSTRUCTIONS]
            for wording in wrong:
                console.print(
                    f"    {wording['instruction']!r} ({wording['group']}): nearest to {wording['nearest']}",
                    markup=False,
                )


def _shades(use: Sequence[float]) -> str:
    """One character an atom."""
    scale = len(use) / 2 * (len(SHADES) - 1)
    return "".join(SHADES[min(round(weight * scale), len(SHADES) - 1)] for weight in use)


def _strongest(use: Sequence[float]) -> str:
    order = sorted(range(len(use)), key=lambda m: -use[m])[:3]
    return ", ".join(f"{m} {use[m]:.0%}" for m in order)
