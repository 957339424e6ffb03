"""The command line: each verb is a thin skin over one Python function."""

import argparse
import glob
import importlib.util
import io
import os
import sys
import traceback
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0 is success; 1 a user's mistake, in one line on stderr (argparse's own are 2); a verb may have
    others, which its help names.
    """
    tpus = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if not tpus and importlib.util.find_spec("libtpu"):
        # Installed for `plan`, libtpu would look for a TPU at length, and complain.
        os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if glob.glob("/dev/nvidia*") else "cpu")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal cannot show is no reason to lose a report.
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if "overrides" in options:
        options.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options) or 0
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ImportError as error:
        # fsspec's, which looks for it when a path is on gs://.
        if "gcsfs" not in str(error):
            raise
        sys.stderr.write("error: gs:// needs gcsfs: pip install 'stf-jax[gcs]'\n")
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        line = _explain(error)
        if line is None:
            raise
        sys.stderr.write(f"error: {line}\n")
        return 1
    return 0


def _explain(error: Exception) -> str | None:
    """The message for the user; None for a bug, whose stack is shown."""
    from stf_jax.util.disk import FullDiskError, full_disk_error, is_full

    if is_full(error) and not isinstance(error, FullDiskError) and not _is_own_error(error):
        return str(full_disk_error(getattr(error, "filename", None) or os.getcwd()))
    if isinstance(error, OSError | ValueError) and _is_own_error(error):
        return str(error)
    return None


def _is_own_error(error: BaseException) -> bool:
    """Whether stf_jax or the system raised the error; a ValueError of a library is a bug."""
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    # An error from a worker process has our class and no frame of ours.
    modules = (frame.f_globals["__name__"], type(error).__module__)
    ours = any(module.partition(".")[0] == "stf_jax" for module in modules)
    return isinstance(error, OSError) or ours


def _parser() -> argparse.ArgumentParser:
    from stf_jax.cli.chat import add_chat
    from stf_jax.cli.compare import add_compare
    from stf_jax.cli.convert import add_convert
    from stf_jax.cli.data import add_data
    from stf_jax.cli.demo import add_demo
    from stf_jax.cli.eval import add_eval
    from stf_jax.cli.generate import add_generate
    from stf_jax.cli.plan import add_plan
    from stf_jax.cli.search import add_search
    from stf_jax.cli.serve import add_serve
    from stf_jax.cli.train import add_train

    parser = argparse.ArgumentParser(
        prog="stf-jax", description="LLaVA-STF in JAX: vision-language models with few tokens."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    add_convert(verbs)
    add_generate(verbs)
    add_chat(verbs)
    add_serve(verbs)
    add_data(verbs)
    add_train(verbs)
    add_demo(verbs)
    add_eval(verbs)
    add_compare(verbs)
    add_plan(verbs)
    add_search(verbs)
    return parser
