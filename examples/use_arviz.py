"""Use ArviZ on a comparison: plot posteriors, gaps and predictions, and see why loo fails here.

python examples/use_arviz.py [epochs, or the folder of a run] [folder for pictures]
"""

import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import xarray

import pvae

warnings.filterwarnings("ignore", message=".*(style.core|Pareto|'axis'|single numeric RGB)")
with suppress(ImportError):
    import matplotlib.style.core  # noqa: F401  arviz-plots 0.8, the last one for Python 3.11, expects it loaded

import arviz_plots  # noqa: E402
import arviz_stats  # noqa: E402

argument = sys.argv[1] if len(sys.argv) > 1 else "30"
pictures = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
run = Path(argument)
if not run.is_dir():  # train the three inference methods on digits
    run = pictures / "run"
    budget = pvae.diagnostics.Budget(K=100, steps=20)
    pvae.compare("digits", epochs=int(argument), latent=4, rows=50, budget=budget, out=run, overwrite=True)

# All groups have the dimension "variant", most have "row", a test row; chain is always 0: draws from q are independent.
idata = xarray.open_datatree(run / "idata.nc").load()
first = idata["posterior"]["variant"].to_numpy()[0]
print(f"{idata.attrs['data']}; groups: {', '.join(idata.children)}")

# Posteriors of one row's latents by variant: each variant has its own decoder, and so its own latent axes.
by_variant = {"aes": {"color": ["variant"]}, "color": ["C0", "C1", "C2"], "backend": "matplotlib"}
forest = arviz_plots.plot_forest(idata.sel(row=0), combined=True, **by_variant)
forest.savefig(pictures / "posteriors.png", bbox_inches="tight")

# Gaps of single rows, in nats: rows are the sample dimension.
names = {"group": "test", "var_names": ["amortization_gap"], "sample_dims": ["row"]}
bare = {"point_estimate": False, "point_estimate_text": False, "credible_interval": False}
gaps = arviz_plots.plot_dist(idata, **names, kind="ecdf", visuals=bare, cols=["__variable__"], **by_variant)
gaps.add_legend("variant", loc="center right")
gaps.savefig(pictures / "gaps.png", bbox_inches="tight")

# Posterior predictive check of the share of inked pixels.
one = idata.sel(variant=first)
rows = slice(0, 29)
ink = {g: one[g].to_dataset().sel(row=rows).mean("value") for g in ("posterior_predictive", "observed_data")}
shares = arviz_plots.plot_ppc_interval(xarray.DataTree.from_dict(ink), backend="matplotlib")
shares.savefig(pictures / "ink.png", bbox_inches="tight")

# loo weights a row's draws by 1 / p(x|z): the harmonic mean, whose weights have infinite variance, as k-hat shows.
loo = arviz_stats.loo(one, pointwise=True)
arviz_plots.plot_khat(loo, backend="matplotlib").savefig(pictures / "khat.png", bbox_inches="tight")
evidence = one["test"]["evidence"]
error = ((loo.elpd_i - evidence) ** 2).mean() ** 0.5
print(f"{first}, held-out evidence: {float(evidence.mean()):.2f} nats per row; report this")
print(f"loo: {loo.elpd / len(evidence):.2f} nats per row, with a root mean squared error of {float(error):.2f};")
print(f"its k-hat is above 0.7 for {float((loo.pareto_k > 0.7).mean()):.0%} of the rows: don't use it")
print(f"pictures: {pictures}")
