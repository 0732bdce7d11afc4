"""`flowfleet`: one command. Errors become one message and an exit code; a traceback only with --debug."""

import os
import sys

import typer
from rich.console import Console
from typer.exceptions import TyperException

from common.errors import FlowfleetError, Interrupted
from common.logs import configure_logging
from deploy.commands import artifacts, catalog, cluster, comparison, control, doctor, evaluation, export, training, watch

app = typer.Typer(
    name="flowfleet",
    help="Post-train flow-matching text-to-image models with online RL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="The shipped recipes.", no_args_is_help=True)
reward_app = typer.Typer(help="The rewards: what there is, and a trial of one.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(reward_app, name="reward")

training.register(app)
evaluation.register(app)
comparison.register(app)
artifacts.register(app)
export.register(app)
watch.register(app)
control.register(app)
cluster.register(app)
doctor.register(app)
catalog.register(app, recipes_app, reward_app)

EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line; the process ends with the code that the README's table names."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its notes on absent image processors are not the user's concern
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    configure_logging("DEBUG" if debug else "INFO")
    errors = Console(stderr=True)
    try:
        code = app(args=arguments, standalone_mode=False)
    except Interrupted as stopped:
        errors.print(f"stopped, the state is saved: {stopped}", style="bold", highlight=False, soft_wrap=True, markup=False)
        raise SystemExit(stopped.exit_code) from None
    except FlowfleetError as error:
        if debug:
            raise
        errors.print(f"error: {error}", style="bold red", highlight=False, soft_wrap=True, markup=False)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        errors.print("interrupted", style="bold red")
        raise SystemExit(EXIT_INTERRUPTED) from None
    except typer.Exit as done:
        raise SystemExit(done.exit_code) from None
    except typer.Abort:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except TyperException as error:
        errors.print(f"usage: {error}", style="bold red", highlight=False, markup=False)
        raise SystemExit(2) from None
    raise SystemExit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
