"""Feature extraction of many slides into a folder of bags with a report; finished ones are kept."""

import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from os import PathLike
from typing import Literal

from xmag.cohort.executors import Engine, Executor, gpu_workers, share_of
from xmag.cohort.given import masked, within
from xmag.cohort.jobs import Job, Settings, by_model, jobs_of
from xmag.cohort.loop import rows_of
from xmag.cohort.report import CohortReport, CohortRow, ReportFile, report_name
from xmag.encoder import TileEncoder
from xmag.errors import InputError, MismatchError, OutputError
from xmag.extract import Transform, resolve_encoder, tell_of_loading
from xmag.grid import Border
from xmag.progress import CohortProgress, ProgressOption
from xmag.tiles.decoding import Damaged
from xmag.urls import place_of

__all__ = ["CohortReport", "CohortRow", "Job", "extract_cohort"]

logger = logging.getLogger(__name__)


def extract_cohort(
    slides: str | PathLike[str] | Iterable[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    model: TileEncoder | str | Sequence[TileEncoder | str] | None = None,
    format: Literal["h5", "safetensors"] = "h5",
    tissue: str | PathLike[str] | None = "auto",
    mpp: float | None = None,
    region: int | None = None,
    overlap: int = 0,
    min_tissue: float | None = 0.25,
    border: Border = "shift",
    roi: str | PathLike[str] | None = None,
    overlay: bool = False,
    batch_size: int | None = None,
    processes: int | None = None,
    slide_timeout: float | None = None,
    memory_limit: int | None = None,
    damaged: Damaged = "error",
    on_mismatch: Literal["error", "redo"] = "error",
    progress: ProgressOption = None,
    transform: Transform | None = None,
    gpus: int | Literal["all"] | None = None,
    executor: Executor | Callable[[], Executor] | None = None,
    shards: int | None = None,
    shard: tuple[int, int] | None = None,
) -> CohortReport:
    """The report of extracting the features of many slides into a folder.

    Each slide's bag goes to ``out/<path below the slides' common folder>.<format>``;
    ``report.csv`` beside them is kept up to date. A slide that cannot be done becomes a row with
    its error, and the others go on; also one that crashes its decoder, as slides are opened and
    decoded in child processes. Running it again does only what is missing: a bag counts as done if
    it is valid and was made from the same slide with the same model, tiles and preprocessing. Runs
    over one folder at the same time share the slides. See docs/reliability.md.

    With `gpus` or `executor` the slides are done by workers, in this machine or others, each of
    which takes one after another. What a lost worker had finished stays; what it had not becomes a
    row with status "lost", unless `executor` is a function that makes an executor: then a new one
    does the rest. Models travel to workers by name, so that they must be able to load it.

    Args:
        slides: A folder (searched for slides), a CSV file, a list of paths, or one path. The CSV
            has a column ``slide`` (relative paths start at the CSV's folder) and optionally
            ``mpp`` (µm/px of level 0, where the file's own is missing or wrong), ``region`` (which
            scan, where the file holds several: a row for each of those that are wanted) and ``id``
            (names the output instead of the path). Slides may be URLs, such as "s3://bucket/slide.svs".
        out: The folder to write to, or the URL of one in a store; made if it is not there.
        model: An encoder, a name or path for `load_model`, or None for the default model. Or a list
            of them, which look at the same tiles: these are decoded once, the bags go to
            ``out/<model>/...``, and each slide has a row, resumes and fails for each model. A
            folder has the last part of its model's name.
        format: "h5" or "safetensors".
        tissue: "auto" finds the tissue of each slide, None takes every tile. Or a folder with a
            mask of each slide, called as its id (``below/a.geojson`` or ``below/a.png`` for
            ``below/a.svs``), or the file of one slide: GeoJSON, inside is tissue, or a PNG of the
            whole slide, black where there is none. Provenance has the file's SHA-256.
        mpp: µm/px of level 0 for every slide that has none in the CSV, whatever its file says.
        region: Which scan of every file that has none in the CSV, where files hold several. The
            bag of any but the first (0) is called ``<name>-region<number>``, so that scans of one
            file never replace each other.
        overlap: Output px that neighbouring tiles share.
        min_tissue: Smallest fraction of a tile's area that is tissue; see `plan_tiles`.
        border: "shift" moves tiles that would reach over the border of a slide inwards, "drop"
            leaves them out; see `plan_tiles`.
        roi: A folder with a GeoJSON file of the region of interest of each slide, called as its id
            (``below/a.geojson`` for ``below/a.svs``); or the file of one slide. See `plan_tiles`.
        overlay: Also write ``<output>.png``, a thumbnail with the tissue outline and the tiles.
        batch_size: Tiles a batch; by default 256 on an accelerator and 32 on a CPU.
        processes: Child processes that open and decode slides, by default one a core if the encoder
            is on CUDA, where decoding is what takes the time, and one elsewhere. 0 decodes in this
            process, which a slide may then crash; Windows has nothing else. With `gpus` or
            `executor` each worker has as many, by default its share of the cores.
        slide_timeout: Seconds that decoding a slide may take, without the time that it waits for
            the model; then its process is killed, and its row says so. None: any time.
        memory_limit: Bytes that a decoding process may allocate, at least 256 MiB; a slide that
            needs more becomes a row that says so. On Linux. None: any amount, but where memory runs
            out for all, these processes go first.
        damaged: What becomes of a slide some of whose tiles are damaged: "error" is its row, "drop"
            leaves those tiles out, with a warning, and counts them in the provenance.
        on_mismatch: What to do with a valid bag that was made with something else: "error" raises
            before any work, "redo" makes it again.
        progress: Show a bar on stderr; None does on a terminal and in a notebook. A function is
            called with each `xmag.progress.ProgressEvent` instead.
        transform: Applied to each batch of tiles, for instance to normalise stains. With workers a
            function at the top of a module that they can import.
        gpus: On how many GPUs of this host, or "all": on several each has a worker process, which
            a script starts below ``if __name__ == "__main__":``. None uses one.
        executor: What runs functions elsewhere: an object whose `submit` returns something with
            `done()` and `result()`, or a function without arguments that makes one. See
            docs/clusters.md.
        shards: How many pieces of work `executor` is given, by default at least 16, and one for
            each 64 slides: it should be no fewer than it has workers.
        shard: ``(i, n)`` does the i-th of n shares of the slides alone, from 0 on, and reports to
            ``report-<i>-of-<n>.csv``: for n processes that do not know of each other.

    Raises:
        InputError: No slides, a CSV without the column, names that collide, an impossible option,
            models of different tiles, a slide without its file in the folder of `tissue` or `roi`.
        MismatchError: Bags in `out` were made with something else (see `on_mismatch`). With
            workers it may come after some have begun.
        ModelError: The model cannot be loaded; with workers, not by its name.
        OutputError: `out` cannot be written to, its disk is full, or it has gone away. What is
            finished stays, and the same call goes on from there.
    """
    # Before the model, which may have to be fetched.
    jobs = jobs_of(slides, format=format, mpp=mpp, region=region)
    if roi is not None:
        jobs = within(jobs, roi)
    choice: Literal["auto", "given"] | None = None
    if tissue is not None:
        choice = "auto" if isinstance(tissue, str) and tissue == "auto" else "given"
    if choice == "given":
        jobs = masked(jobs, tissue)
    if shard is not None:
        jobs = share_of(jobs, shard)
    if gpus is not None:
        if executor is not None:
            raise InputError("gpus and executor both say who does the slides; give one of them")
        executor, processes = gpu_workers(gpus, processes)
    tell_of_loading(model, progress)
    engine = None if executor is None else Engine(executor, shards=shards, model=model)
    encoders = (
        by_model(model, resolve_encoder, lambda encoder: encoder)
        if engine is None
        else engine.encoders
    )
    settings = Settings(
        encoders=encoders,
        out=place_of(out),
        tissue=choice,
        overlap=overlap,
        min_tissue=min_tissue,
        border=border,
        overlay=overlay,
        batch_size=batch_size,
        processes=processes,
        slide_timeout=slide_timeout,
        memory_limit=memory_limit,
        damaged=damaged,
        on_mismatch=on_mismatch,
        transform=transform,
    )
    rows: dict[Job, CohortRow] = {}
    slides_jobs = [(job,) if "" in encoders else job.of_models(encoders) for job in jobs]
    jobs = list(chain.from_iterable(slides_jobs))
    with (
        ReportFile(settings.out / report_name(shard), jobs, rows) as report,
        CohortProgress(progress, len(jobs)) as shown,
    ):
        if engine is None:
            count = settings.processes_for(len(slides_jobs))
            found = rows_of(slides_jobs, settings, processes=count, note=shown.count)
        else:
            found = engine.rows(jobs, settings)
        try:
            _fill(rows, found, report, partial(shown.row, is_elsewhere=engine is not None))
        except MismatchError:
            raise
        except OutputError as error:
            raise OutputError(
                f"{error}. {len(rows)} of {len(jobs)} slides have their rows; once that is put"
                " right, the same call goes on from there"
            ) from error
    return CohortReport(tuple(rows[job] for job in jobs), settings.out, tuple(jobs))


def _fill(
    rows: dict[Job, CohortRow],
    source: Generator[tuple[Job, CohortRow], None, None],
    report: ReportFile,
    note: Callable[[str, int], object],
) -> None:
    """Collect the rows as they come, with report, log and progress."""
    with closing(source) as done:
        for job, row in done:
            rows[job] = replace(row, region=job.region)
            logger.info("%s: %s %s", row.slide, row.status, row.error)
            report.update()
            note(row.status, row.tiles)
