"""Commands that use a run, end to end: files, sentences, the page, and one line with status 2 for every mistake."""

import functools
import html
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pyarrow import csv

from pvae.cli.run_commands import COMMANDS
from pvae.experiments.use_results import FOLDER, VERBS
from tests.experiments.test_run import COMPARE, COUNTS, DIGITS, IMAGES, at, run_of

pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")

PLANE = "fit --epochs 4 --hidden 16 --latent 2 --validation-size 0.05"
SPACE = "fit --epochs 2 --hidden 16 --latent 3 --only 0,1"
BARE = "fit --epochs 1 --hidden 8 --latent 2 --likelihood Poisson --data {place}/counts.npy"
ROWS, FEW = "--select 0:12", "--select 0:6 --steps 4"

# What each verb is asked, and the arrays that it gives with their shapes; R rows, D latents.
ASKED = {
    "reconstruct": (f"reconstruct RUN {ROWS}", {"x": (12, 64), "row": (12,)}),
    "sample": ("sample RUN --count 10 --temperature 0.7", {"x": (10, 64)}),
    "interpolate": ("interpolate RUN --select 3,1,4 --steps 5", {"x": (11, 64), "z": (11, "D"), "at": (11,)}),
    "map": (f"map RUN {ROWS} --size 4", {"codes": (12, 2), "grid": (4, 4, 64), "label": (12,)}),
    "encode": (f"encode RUN {ROWS}", {"mean": (12, "D"), "sd": (12, "D"), "rate": (12,), "distortion": (12,)}),
    "decode": ("decode RUN codes.npy --draw", {"x": (5, 64)}),
    "posterior": (
        f"posterior RUN {ROWS} --accuracy quick --draws 7",
        {"mean": (12, "D"), "ess": (12,), "k_hat": (12,), "draws_z": (7, 12, "D")},
    ),
    "denoise": (f"denoise RUN {FEW} --samples 8 --noise 'FlipNoise(rate=0.1)'", {"x": (6, 64), "seen": (6, 64)}),
    "impute": (f"impute RUN {FEW} --samples 8 --hide 0.5", {"x": (6, 64), "sd": (6, 64), "draws": (5, 6, 64)}),
    "anomalies": ("anomalies RUN --samples 2", {"row": (..., ), "evidence": (..., ), "flagged_elbo": (..., )}),
    "augment": (f"augment RUN {ROWS} --per-row 2", {"x": (24, 64), "row": (24,), "label": (24,)}),
    "classify": (f"classify RUN {ROWS} --epochs 1 --samples 2", {"predicted": (12,), "probability": (12, ...)}),
}  # fmt: skip
RUNS = {"2": PLANE, "3": SPACE}


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Where a test stands: with files of codes and of rows, good and bad."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@functools.cache
def codes(dim):
    return np.random.default_rng(0).normal(size=(5, dim)).astype("float32")


@functools.cache
def used_of(D):
    """A copy of a run that all verbs may use."""
    origin = run_of(RUNS[D])
    folder = origin.parent / "used"
    shutil.copytree(origin, folder)
    return folder


def told(done):
    """The lines of a command that went well, without where files were written."""
    assert done.status == 0, done.err
    *lines, last = done.out.splitlines()
    assert last.startswith("written: ")
    return lines


def arrays(path):
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def tree(folder="."):
    """Every file below a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_table_of_mistakes_names_each_verb():
    assert {line.split()[0] for line, _ in MISTAKES.values()} == set(VERBS)


def test_every_verb_is_asked_and_named_alike():
    assert tuple(COMMANDS) == tuple(ASKED) == VERBS


@pytest.mark.parametrize("D", RUNS)
@pytest.mark.parametrize("verb", ASKED)
def test_every_verb_writes_its_files_and_says_numbers(verb, D, pvae):
    np.save("codes.npy", codes(int(D)))
    line, shapes = ASKED[verb]
    folder = used_of(D)
    lines = told(pvae(line.replace("RUN", str(folder))))
    assert lines
    assert re.search(r"\d", lines[0])
    assert "nan" not in " ".join(lines)
    made = arrays(folder / FOLDER / f"{verb}.npz")
    for name, shape in shapes.items():
        wanted = tuple(int(D) if size == "D" else size for size in shape)
        assert len(made[name].shape) == len(wanted)
        assert all(there == size for there, size in zip(made[name].shape, wanted, strict=True) if size is not ...), name
        assert np.isfinite(made[name]).all()
    assert (folder / FOLDER / f"{verb}.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / FOLDER / f"{verb}.html").exists() == (verb == "map")
    assert all(array.dtype.kind in "fib" or name in ("how", "method") for name, array in made.items())


@pytest.mark.parametrize("verb", [verb for verb in ASKED if verb != "classify"])
def test_a_seed_fixes_every_byte_and_another_changes_what_is_drawn(verb, pvae):
    np.save("codes.npy", codes(2))
    line = ASKED[verb][0].replace("RUN", str(run_of(PLANE)))
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        told(pvae(f"{line} --seed {seed} --out {name}.npz"))
    one, other = (arrays(f"{name}.npz") for name in "ac")
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()
    changed = {name for name in one if one[name].tobytes() != other[name].tobytes()}
    if verb == "interpolate":  # codes' means are not drawn
        assert changed == set()
    elif verb == "map":
        assert changed == {"prior"} | changed & {"grid_x", "grid_y", "grid"}  # as far as the prior's draws reach
    else:
        assert changed


OUTPUTS = [f"deep/out{kind}" for kind in (".npz", ".npy", ".csv", ".png")]


def test_outputs_are_written_where_they_are_asked_for_and_nowhere_else(pvae):
    before = tree(run_of(PLANE))
    told(pvae(f"encode {run_of(PLANE)} {ROWS} " + " ".join(f"--out {path}" for path in OUTPUTS)))
    assert tree().keys() == set(OUTPUTS)
    assert tree(run_of(PLANE)) == before
    whole = arrays("deep/out.npz")
    np.testing.assert_array_equal(np.load("deep/out.npy"), whole["mean"])
    table = csv.read_csv("deep/out.csv")
    assert table.column_names == ["mean0", "mean1", "sd0", "sd1", "rate", "distortion", "error", "row", "label"]
    assert table.column("rate").to_numpy().astype("float32").tolist() == whole["rate"].tolist()
    told(pvae(f"map {run_of(PLANE)} --select 0:20 --size 20 --out map.html --out map.csv"))
    assert Path("map.html").read_text().count("</html>") == 1
    assert csv.read_csv("map.csv").column_names == ["codes0", "codes1", "label"]  # not the grid's 20 lines


def test_arrays_say_where_their_rows_stand(pvae):
    run, select = run_of(PLANE), "--select 7,2,40"
    for line, rows in (
        (f"encode {run} {select}", [7, 2, 40]),
        (f"reconstruct {run} train {select}", [7, 2, 40]),
        (f"augment {run} {select} --per-row 2", [7, 7, 2, 2, 40, 40]),
    ):
        told(pvae(f"{line} --out out.npz --overwrite"))
        assert arrays("out.npz")["row"].tolist() == rows
    told(pvae(f"encode {run} --out all.npz"))
    told(pvae(f"encode {run} {select} --out some.npz"))
    np.testing.assert_allclose(arrays("some.npz")["mean"], arrays("all.npz")["mean"][[7, 2, 40]], rtol=1e-4, atol=1e-6)


def test_what_is_hidden_is_the_seeds_and_of_the_share_asked(pvae):
    hidden = []
    for seed in (1, 2):
        told(pvae(f"impute {run_of(PLANE)} {FEW} --samples 4 --hide 0.3 --seed {seed} --out {seed}.npz"))
        x = arrays(f"{seed}.npz")["x"]
        hidden.append((x > 0) & (x < 1))  # what is there is 0 or 1; what is filled in is a mean
    assert not np.array_equal(*hidden)
    for own in hidden:
        assert abs(own.mean() - 0.3) < 4.5 * np.sqrt(0.3 * 0.7 / own.size)


def test_an_output_is_replaced_only_when_told(pvae):
    line = f"reconstruct {run_of(PLANE)} {ROWS} --out out.npz"
    told(pvae(line))
    Path("out.npz").write_text("mine")
    assert pvae(line).status == 2
    assert Path("out.npz").read_text() == "mine"
    told(pvae(f"{line} --overwrite"))
    assert arrays("out.npz")["x"].shape == (12, 64)


@pytest.mark.parametrize("kind", [".npz", ".npy", ".csv"])
def test_codes_decode_from_every_file_that_encode_writes(kind, pvae):
    run = run_of(PLANE)
    told(pvae(f"encode {run} {ROWS} --out codes{kind} --out all.npz"))
    told(pvae(f"decode {run} codes{kind} --out back.npz"))
    mean = arrays("all.npz")["mean"]
    np.save("mean.npy", mean)
    told(pvae(f"decode {run} mean.npy --out mean.npz"))
    np.testing.assert_allclose(arrays("back.npz")["x"], arrays("mean.npz")["x"], rtol=1e-5)
    three = pvae(f"encode {run_of(SPACE)} {ROWS} --out three{kind}")
    assert three.status == 0
    done = pvae(f"decode {run} three{kind}")
    assert done.status == 2
    assert "the codes have shape (12, 3), but 2 columns are needed" in done.err


def test_files_are_rows_as_the_runs_own_are(pvae):
    run = run_of(PLANE)
    np.savez("rows.npz", x=IMAGES, y=DIGITS.target[:12])
    lines = told(pvae(f"reconstruct {run} rows.npz --out a.npz"))
    assert "over 12 rows of rows.npz" in lines[0]
    told(pvae(f"augment {run} rows.npz --out b.npz"))
    assert arrays("b.npz")["label"].tolist() == DIGITS.target[:12].repeat(4).tolist()
    # Noisy rows are taken as they are, and need not be 0 or 1.
    noisy = np.clip(IMAGES, 0, 1) + np.random.default_rng(0).normal(size=IMAGES.shape).astype("float32")
    np.save("noisy.npy", noisy)
    told(pvae(f"denoise {run} noisy.npy --samples 4 --steps 2 --out c.npz"))
    np.testing.assert_array_equal(arrays("c.npz")["seen"], noisy.reshape(12, 64))
    # Missing entries are filled in, and what is there stays as it is.
    np.save("gaps.npy", at(IMAGES > 0.5, 2, slice(5, 9), np.nan))
    told(pvae(f"impute {run} gaps.npy --samples 4 --steps 2 --out d.npz"))
    filled, there = arrays("d.npz")["x"], (IMAGES > 0.5).reshape(12, 64).astype("float32")
    assert np.isfinite(filled).all()
    assert set(map(tuple, np.argwhere(filled != there))) <= {(2, column) for column in range(5, 9)}


def test_a_comparison_says_which_variant_it_used(pvae):
    run = run_of(COMPARE)
    done = pvae(f"encode {run} --select 0:3 --out a.npz")
    assert (done.status, done.err.splitlines()[0]) == (0, "Amortized, of 2 variants (--variant names another)")
    done = pvae(f"encode {run} --select 0:3 --variant SemiAmortized --out b.npz")
    assert (done.status, "variants" in done.err) == (0, False)
    assert not np.array_equal(arrays("a.npz")["mean"], arrays("b.npz")["mean"])


# The page


def test_the_page_shows_uses_until_the_run_is_fitted_anew(pvae, workplace):
    fit = f"fit --epochs 1 --hidden 8 --latent 2 --data {workplace}/counts.npy --likelihood Poisson --out run"
    np.save("counts.npy", COUNTS)
    assert pvae(fit).status == 0
    lines = told(pvae("reconstruct run")) + told(pvae("sample run --count 8")) + told(pvae("map run --size 3"))
    evaluate = "evaluate run --rows 3 --samples 3 --refine-steps 3"
    assert pvae(evaluate).status == 0
    page = html.unescape(Path("run/report.html").read_text())
    assert "Uses of the run" in page
    for line in lines:
        assert line in page
    assert [verb for verb in VERBS if f"<h3>{verb}, Amortized</h3>" in page] == ["reconstruct", "sample", "map"]
    assert page.count('<img src="data:image/png;base64,') >= 2
    # A use of another fit is no longer told of, though its files are there.
    kept = tree("run/uses")
    assert pvae(f"{fit.replace('--epochs 1', '--epochs 2')} --overwrite").status == 0
    assert not Path("run/uses").exists()
    for name, content in kept.items():
        path = Path("run/uses") / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert pvae(evaluate).status == 0
    assert "Uses of the run" not in Path("run/report.html").read_text()


# Mistakes

MISTAKES = {
    "wrong columns": ("reconstruct RUN narrow.npy", "rows have 63 columns, but the run's have 64 (8 x 8)"),
    "no numbers between 0 and 1": ("encode RUN large.npy", "row 3, column 1 is 7"),
    "outside the support": ("encode BARE half.npy", "outside the support of the run's likelihood Poisson"),
    "NaN": ("reconstruct RUN gaps.npy", "row 2, column 5 is nan"),
    "labels of none": ("classify BARE", "classify needs labels"),
    "anomalous of none": ("anomalies BARE --anomalous 1 --false-alarm 0.2", "have no labels"),
    "plane of three": ("map SPACE --projection plane", "take 'pca' or 'tsne'"),
    "empty selection": ("encode RUN --select 5:5", "--select 5:5 is empty"),
    "no selection": ("encode RUN --select ''", "write positions, as 3,17,5 or 0:20"),
    "beyond the last": ("encode RUN --select 0:99999", "there is no row 359"),
    "no such rows": ("encode RUN tset", "there are no rows 'tset'; did you mean 'test'?"),
    "variant": ("encode RUN --variant Amortised", "has no variant 'Amortised'; did you mean 'Amortized'?"),
    "no run": ("encode nothing", "nothing is not a run"),
    "format": ("encode RUN --out codes.txt", "unknown format '.txt'"),
    "no page": ("encode RUN --select 0:3 --out new.npz --out codes.html", "only map makes a page"),
    "existing": ("encode RUN --out narrow.npy", "narrow.npy exists; give --overwrite"),
    "noise": ("denoise RUN --noise Gausian", "unknown noise 'Gausian'; did you mean 'GaussianNoise'?"),
    "argument of noise": ("denoise RUN --noise 'FlipNoise(scale=1)'", "noise FlipNoise takes no argument 'scale'"),
    "noise of counts": ("denoise BARE --noise 'FlipNoise(rate=0.1)'", "FlipNoise does not take"),
    "hide": ("impute RUN --hide 1.5", "--hide is 1.5, but it must be a share between 0 and 1"),
    "hide nothing": ("impute RUN", "no entry of the test rows is missing (NaN); --hide 0.5 hides half of them"),
    "false alarm": ("anomalies RUN --false-alarm 0", "--false-alarm is 0.0"),
    "rare alarm": ("anomalies RUN --false-alarm 0.001", "rows"),
    "score": ("anomalies RUN --score evidense", "did you mean 'evidence'?"),
    "anomalous": ("anomalies RUN --anomalous 99", "--anomalous: no row has label 99"),
    "anomalous words": ("anomalies RUN --anomalous seven", "--anomalous: 'seven' is no label"),
    "broken file": ("reconstruct RUN broken.npz", "not a readable .npz file"),
    "broken codes": ("decode RUN broken.npz", "not a readable .npz file"),
    "codes": ("decode RUN narrow.npy", "the codes have shape (12, 63), but 2 columns are needed"),
    "NaN among codes": ("decode RUN nowhere.npy", "row 1 of the codes is not finite"),
    "no codes": ("decode RUN absent.npy", "absent.npy: no such file"),
    "temperature": ("sample RUN --temperature -1", "--temperature is -1.0, but it must be at least 0"),
    "count": ("sample RUN --count 0", "--count is 0, but it must be at least 1"),
    "seed": ("sample RUN --seed -1", "--seed is -1, but it must be at least 0"),
    "large seed": ("sample RUN --seed 3000000000", "--seed is 3000000000"),
    "draws": ("encode RUN --samples 0", "--samples is 0, but it must be at least 1"),
    "per row": ("augment RUN --per-row 0", "--per-row is 0"),
    "spread": ("augment RUN --spread -1", "--spread is -1, but it must be at least 0"),
    "path": ("interpolate RUN --how straight", "unknown path 'straight'"),
    "one row": ("interpolate RUN --select 3", "a path needs at least 2 rows, but 1 is given"),
    "steps": ("interpolate RUN --steps 0", "steps is 0"),
    "grid": ("map RUN --size 1", "size is 1, but it must be at least 2"),
    "projection": ("map RUN --projection umap", "unknown projection 'umap'"),
    "epochs": ("classify RUN --epochs 0", "--epochs is 0, but it must be at least 1"),
    "samples": ("classify RUN --samples 0", "--samples is 0, but it must be at least 1"),
    "accuracy": ("posterior RUN --accuracy exact", "--accuracy exact is no accuracy (known: quick, standard, high)"),
    "posterior draws": ("posterior RUN --draws 0", "--draws is 0, but it must be at least 1"),
    "device": ("encode RUN --device tpu", "unknown device 'tpu'"),
}  # fmt: skip


def mistaken_files():
    np.save("narrow.npy", IMAGES.reshape(12, 64)[:, :63])
    np.save("large.npy", at(IMAGES, 3, 1, 7))
    np.save("gaps.npy", at(IMAGES, 2, 5, np.nan))
    np.save("half.npy", at(COUNTS[:4], 1, 2, 0.5))
    np.save("nowhere.npy", np.array([[0, 0], [np.nan, 0]]))
    Path("broken.npz").write_bytes(b"PK broken")


@pytest.mark.parametrize(("line", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_and_leaves_no_trace(line, words, pvae):
    mistaken_files()
    folders = {"RUN": run_of(PLANE), "SPACE": run_of(SPACE), "BARE": run_of(BARE)}
    for name, folder in folders.items():
        line = re.sub(rf"\b{name}\b", str(folder), line)
    before = tree(), [tree(folder) for folder in folders.values()]
    done = pvae(line)
    assert done.status == 2
    (said,) = done.err.splitlines()
    assert said.startswith("error: ")
    assert words in said
    assert done.out == ""
    assert (tree(), [tree(folder) for folder in folders.values()]) == before


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_can_not_be_written_is_named(pvae, workplace):
    (workplace / "locked").mkdir(mode=0o500)
    done = pvae(f"encode {run_of(PLANE)} {ROWS} --out locked/out.npz")
    assert (done.status, "can't write locked/out.npz" in done.err) == (2, True)
