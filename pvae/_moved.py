"""Tell where a module of version 0.1 has moved: one table, no shims."""

import importlib.abc

# Old path below pvae = new path below pvae.
_TABLE = """
ais=samplers.ais anomalies=applications.anomalies beside=cli.baselines building=recipes.build
calibration=diagnostics.calibration captured=training.cuda_graph checkpoints=training.checkpoints
checks=recipes.preflight classes=applications.classification coding=applications.coding commands=cli.run_commands
compare=experiments.compare components=recipes.registry console=runtime.progress curvature=samplers.gaussian_vi
deciding=cli.run_classification densities=distributions.univariate diagnose=experiments.diagnosis
distributed=training.data_parallel drawing=reporting.style engines=training.svi_engines
evaluation=diagnostics.evaluation export=experiments.arviz_export families=inference.families
figures=reporting.comparison_figures files=runtime.files flags=cli.options flows=distributions.flows
gaps=diagnostics.gaps grid=experiments.sweep guides=inference.guides health=diagnostics.latent_usage
hmc=samplers.hmc latent_panels=reporting.latent_figures launch=runtime.torchrun ledger=runtime.result_cache
likelihoods=generative.likelihoods map_panels=reporting.latent_map_widget mapped=data.memmap
missing=distributions.masked_likelihood mixtures=distributions.mixtures networks=generative.networks
noise=generative.noise objectives=training.objectives opened=experiments.run optimizer=training.optimizer
panels=reporting.diagnosis_figures passes=inference.posterior planes=applications.latent_map
precision=runtime.precision predictive=diagnostics.predictive_checks priors=generative.priors
proximity=diagnostics.latent_geometry ranks=runtime.distributed recipe=recipes.recipe recorded=runtime.tracing
reference=diagnostics.reference_posterior refine=inference.refinement report=reporting.html_report
restoring=applications.restoration results=experiments.results rules=diagnostics.trust runs=experiments.run_folder
sites=inference.latents sources=data.sources stages=diagnostics.battery stopping=runtime.signals
support=training.support_check tables=reporting.tables tally=inference.streaming targets=samplers.log_joint
use_pictures=reporting.application_figures used=experiments.use_results uses=applications using=cli.run_coding
values=data.preprocessing verdicts=experiments.conclusions weights=inference.importance
"""
MOVED = dict(pair.split("=") for pair in _TABLE.split())


class MovedModules(importlib.abc.MetaPathFinder):
    """Import hook that is asked last, and refuses an old module path with the new one."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Return None for all other names, as a finder that does not know them.

        Raises:
            ImportError: the name is an old module path.
        """
        package, _, name = fullname.partition(".")
        if package != "pvae" or name not in MOVED:
            return
        raise ImportError(f"pvae.{name} has moved to pvae.{MOVED[name]}", name=fullname)
