"""The command line: arguments to calls, results to tables. Everything that is printed is printed here."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import finf_fast as ff
from finf_fast.ops import dispatch
from finf_fast.scores.comparing import check_kind

app = typer.Typer(help=ff.__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.command()
def audit(
    model: Annotated[
        str,
        typer.Argument(
            help="file.py:function or package.module:function that returns the model, or a Hugging Face folder"
        ),
    ],
    corpus: Annotated[str, typer.Argument(help="training data: a file, a folder or a pattern of files")],
    queries: Annotated[Path, typer.Argument(help="queries, in a format the corpus may have")],
    labels: Annotated[Path | None, typer.Option(help="labels of the corpus")] = None,
    query_labels: Annotated[Path | None, typer.Option(help="labels of the queries")] = None,
    rows: Annotated[str, typer.Option(help="which queries, as 0,3,7; all by default")] = "",
    loss: Annotated[str, typer.Option(help="cross_entropy, causal_lm, squared_error, ...")] = "cross_entropy",
    method: Annotated[str, typer.Option(help="mirror step: sgd, adam, released, kfac, ekfac, fisher_diag, cg")] = "sgd",
    lr: Annotated[float | None, typer.Option(help="size of the step; the method's own by default")] = None,
    direction: Annotated[str, typer.Option(help="ascent or descent")] = "ascent",
    steps: Annotated[int, typer.Option(min=1)] = 1,
    window: Annotated[int | None, typer.Option(help="tokens a sample, for token files")] = None,
    stride: Annotated[int | None, typer.Option(help="tokens between samples; the window by default")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="tokens of a text, at most")] = None,
    sample: Annotated[str | None, typer.Option(help="document or sequence, of Megatron's files")] = None,
    columns: Annotated[
        str, typer.Option(help="of a saved dataset, as input_ids,labels; by default those that text models take")
    ] = "",
    mean: Annotated[str, typer.Option(help="of pixels over 255, a channel each, as 0.49,0.48,0.45")] = "",
    std: Annotated[str, typer.Option(help="of pixels over 255, a channel each")] = "",
    layout: Annotated[str | None, typer.Option(help="of images: NHWC or NCHW")] = None,
    io: Annotated[str, typer.Option(help="how files are read: auto, map or read")] = "auto",
    out: Annotated[Path | None, typer.Option(help="result folder; an interrupted audit resumes from it")] = None,
    report: Annotated[Path | None, typer.Option(help="write an HTML page")] = None,
    top: Annotated[int, typer.Option(min=1, help="samples shown a query")] = 5,
    tail: Annotated[str, typer.Option(help="helpful, harmful or both")] = "helpful",
    normalized: Annotated[
        str | None, typer.Option(help="order by rms, zscore, ratio or absolute; raw influence by default")
    ] = None,
    background: Annotated[int, typer.Option(min=0, help="training samples asked beside few queries")] = 0,
    device: Annotated[str | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    engine: Annotated[
        str, typer.Option(help="auto, delta (carry the change), pair (subtract) or dot (first order)")
    ] = "auto",
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float32 or float64; the model's own by default")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: score the i-th of n slices, counted from 0")] = None,
) -> None:
    """Score every training sample for every query and show the strongest."""
    if tail not in ("helpful", "harmful", "both"):
        raise ValueError(f"tail: wanted helpful, harmful or both, got {tail!r}")
    given = {"window": window, "stride": stride, "max_length": max_length, "sample": sample, "layout": layout}
    given |= {"columns": columns.split(",") if columns else None, "mean": _numbers("mean", mean)}
    given |= {"std": _numbers("std", std)}
    options = {key: value for key, value in given.items() if value is not None}
    data = ff.open_corpus(corpus, labels=labels, io=io, **options)
    asked = ff.open_corpus(queries, labels=query_labels, **options)
    groups = [[int(row)] for row in rows.split(",")] if rows else None
    _check_normalized(normalized, len(groups or asked) + background)
    step = {"loss": loss, "method": method, "lr": lr, "direction": direction, "steps": steps}
    where = {"device": device, "batch_size": batch_size, "out": out, "shard": _shard(shard)}
    where |= {"engine": engine, "dtype": None if dtype is None else _dtype(dtype)}
    batch = asked.read(0, len(asked))
    step |= {"background": background}
    scores = ff.forward_inf(_model(model, loss), data, batch, groups=groups, **step, **where)
    console.print(_strongest(scores, top, tail, normalized))
    console.print(f"{len(scores)} samples, {len(scores.names)} queries; {scores.plan}")
    if report is not None:
        from finf_fast.report import html_report

        picked = range(len(asked)) if groups is None else [group[0] for group in groups]
        title = f"Audit of {Path(corpus).name}"
        page = html_report(report, scores, data, [asked[i] for i in picked], title=title, k=top)
        console.print(f"page: {page}", soft_wrap=True)


@app.command()
def demo(
    which: Annotated[str, typer.Argument(help="digits, text or all")] = "all",
    out: Annotated[Path, typer.Option(help="where results and pages go")] = Path("runs/demo"),
) -> None:
    """Find leaked images and planted passages again, in real data, from training to report."""
    from finf_fast import demo as demos

    demos.show(which, out, console)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context, name: Annotated[str, typer.Argument(help="a benchmark, or nothing for the list")] = ""
) -> None:
    """Measure this machine: `finf-fast bench cross_entropy_delta --quick`."""
    found = importlib.util.find_spec("finf_fast.bench")
    names = sorted(
        m.name.removeprefix("bench_")
        for m in pkgutil.iter_modules(found.submodule_search_locations)
        if m.name.startswith("bench_")
    )
    if name not in names:
        console.print(f"benchmarks: {', '.join(names)}")
        raise typer.Exit(0 if not name else 2)
    sys.path[:0] = list(found.submodule_search_locations)  # the scripts share measure, machine and table by these names
    importlib.import_module(f"bench_{name}").main(context.args)


@app.command()
def info() -> None:
    """Which compiled faces run here, on which instruction set, and why another does not."""
    table = Table("operation", "face", "available", "why")
    for op in dispatch.TABLE:
        for verdict in ff.ops.faces(op):
            table.add_row(op, verdict.face, "yes" if verdict.available else "no", verdict.reason)
    console.print(table)
    versions = f"finf_fast {ff.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    console.print(f"{versions}, {torch.get_num_threads()} threads")
    try:
        compiled = dispatch.compiled()
    except ImportError as error:
        console.print(f"compiled extension: not built ({error})")
        return
    console.print(f"instruction set: {compiled.isa()} of {', '.join(compiled.isas())}")
    console.print(
        f"built with {compiled.build_info()['compiler']}, CUDA {'yes' if compiled.build_info()['cuda'] else 'no'}"
    )


def main() -> None:
    """Entry point of ``finf-fast``: a user's mistake is one line, not a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        Console(stderr=True, soft_wrap=True).print(
            f"finf-fast: {type(error).__name__}: {error}", markup=False, style="red"
        )
        sys.exit(1)


def _model(spec: str, loss: str) -> torch.nn.Module:
    """The model that ``file.py:function``, ``module:function`` or a Hugging Face folder names."""
    if Path(spec).is_dir():
        return _hugging_face(spec, loss)
    place, _, function = spec.rpartition(":")
    if not place:
        raise ValueError(f"model: wanted file.py:function, module:function or a folder, got {spec!r}")
    if place.endswith(".py"):
        found = importlib.util.spec_from_file_location(Path(place).stem, place)
        module = sys.modules[found.name] = importlib.util.module_from_spec(found)
        sys.path.insert(0, str(Path(place).parent))
        found.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(place)
    build = getattr(module, function, None)
    if not callable(build):
        raise ValueError(f"model: {place} has no function {function!r}")
    return build()


def _hugging_face(folder: str, loss: str) -> torch.nn.Module:
    import transformers

    kinds = {
        "causal_lm": "AutoModelForCausalLM",
        "masked_lm": "AutoModelForMaskedLM",
        "seq2seq": "AutoModelForSeq2SeqLM",
        "cross_entropy": "AutoModelForSequenceClassification",
    }
    if loss not in kinds:
        raise ValueError(f"loss: wanted one of {', '.join(kinds)} for a Hugging Face folder, got {loss!r}")
    return getattr(transformers, kinds[loss]).from_pretrained(folder, local_files_only=True)


def _dtype(word: str) -> torch.dtype:
    found = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    if word not in found:
        raise ValueError(f"dtype: wanted {', '.join(found)}, got {word!r}")
    return found[word]


def _numbers(name: str, text: str) -> list[float] | None:
    try:
        return [float(word) for word in text.split(",")] if text else None
    except ValueError:
        raise ValueError(f"{name}: wanted numbers with commas between, got {text!r}") from None


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        i, n = text.split("/")
        return int(i), int(n)
    except ValueError:
        raise ValueError(f"shard: wanted i/n, got {text!r}") from None


def _check_normalized(kind: str | None, queries: int) -> None:
    """Before the sweep: an hour of work should not end in a word that was wrong from the start."""
    if kind == "relatif":
        raise ValueError("normalized: 'relatif' wants self_influence; call Scores.top(..., normalized='relatif')")
    if kind is not None:
        check_kind(kind, queries)


def _strongest(scores: Any, k: int, tail: str, normalized: str | None) -> Table:
    table = Table("query", "rank", "sample", f"influence, {normalized}" if normalized else "influence", "base loss")
    first = int(scores.indices[0])
    for name, found in zip(scores.names, scores.tops(k, tail, normalized=normalized), strict=True):
        for rank, (index, influence) in enumerate(zip(*found, strict=True), 1):
            base = scores.base[int(index) - first]
            table.add_row(
                name if rank == 1 else "", str(rank), str(int(index)), f"{float(influence):+.4g}", f"{base:.4g}"
            )
    return table


if __name__ == "__main__":
    main()
