"""Open a run's idata.nc with ArviZ: plot its posteriors and predictions, and see what loo makes of it.

python examples/use_arviz.py [epochs, or the folder of a run] [folder for pictures]
"""

import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import xarray

import pvae
from pvae.experiments.compare import RunOptions, compare

warnings.filterwarnings("ignore", message=".*(style.core|Pareto|'axis'|single numeric RGB)")
with suppress(ImportError):
    import matplotlib.style.core  # noqa: F401  arviz-plots 0.8, the last one for Python 3.11, expects it loaded

import arviz_plots  # noqa: E402
import arviz_stats  # noqa: E402

given = sys.argv[1] if len(sys.argv) > 1 else "30"
pictures = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
run = Path(given)
if not run.is_dir():  # train the three sources of inference on digits
    run = pictures / "run"
    small = RunOptions(run, rows=50, budget=pvae.diagnostics.Budget(K=100, steps=20))
    compare(pvae.Recipe(epochs=int(given), latent=4), small, overwrite=True)

# Every group has the dimension "variant", most have "row", a test row; chain is always 0: draws from q are independent.
idata = xarray.open_datatree(run / "idata.nc").load()
first = idata["posterior"]["variant"].to_numpy()[0]
print(f"{idata.attrs['data']}; groups: {', '.join(idata.children)}")

# The latents of one row as each variant infers them: each has a decoder of its own, and axes of its own.
shown = {"aes": {"color": ["variant"]}, "color": ["C0", "C1", "C2"], "backend": "matplotlib"}
forest = arviz_plots.plot_forest(idata.sel(row=0), combined=True, **shown)
forest.savefig(pictures / "posteriors.png", bbox_inches="tight")

# Gaps of single rows, in nats: here the rows take the place of the draws.
names = {"group": "test", "var_names": ["amortization_gap"], "sample_dims": ["row"]}
bare = {"point_estimate": False, "point_estimate_text": False, "credible_interval": False}
gaps = arviz_plots.plot_dist(idata, **names, kind="ecdf", visuals=bare, cols=["__variable__"], **shown)
gaps.add_legend("variant", loc="center right")
gaps.savefig(pictures / "gaps.png", bbox_inches="tight")

# The share of inked pixels: what the program draws for a row whose latents it has inferred, and what the row has.
one = idata.sel(variant=first)
kept = slice(0, 29)
ink = {g: one[g].to_dataset().sel(row=kept).mean("value") for g in ("posterior_predictive", "observed_data")}
shares = arviz_plots.plot_ppc_interval(xarray.DataTree.from_dict(ink), backend="matplotlib")
shares.savefig(pictures / "ink.png", bbox_inches="tight")

# loo reweights a row's draws by 1 / p(x|z): the harmonic mean, whose weights have no variance, as k-hat says.
loo = arviz_stats.loo(one, pointwise=True)
arviz_plots.plot_khat(loo, backend="matplotlib").savefig(pictures / "khat.png", bbox_inches="tight")
evidence = one["test"]["evidence"]
off = ((loo.elpd_i - evidence) ** 2).mean() ** 0.5
print(f"{first}, held-out evidence: {float(evidence.mean()):.2f} nats per row; this is the number to report")
print(f"loo: {loo.elpd / len(evidence):.2f} nats per row, {float(off):.2f} away in a row (root mean square);")
print(f"its k-hat is above 0.7 for {float((loo.pareto_k > 0.7).mean()):.0%} of the rows, so don't use it")
print(f"pictures: {pictures}")
