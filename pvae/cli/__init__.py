"""The command line ``pvae``: flags to a recipe and a job, results to the screen, a mistake to one line and status 2."""

from pvae.cli.app import main as main
