"""``flexbatch profile``: measures this machine, keeps the result for later runs, and gives it out as JSON."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path

from flexbatch.cli.console import Console
from flexbatch.cli.options import add_device_options, device_options
from flexbatch.cli.progress import LoadMeter
from flexbatch.errors import ExitCode
from flexbatch.jobs.durable import replace_file
from flexbatch.jobs.output import check_place


def add_profile_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the options of ``flexbatch profile``."""
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the profile there instead of to stdout")
    parser.add_argument("--quiet", action="store_true", help="write nothing to stderr but errors")
    add_device_options(parser.add_argument_group("machine"))


def run_profile(values: argparse.Namespace) -> ExitCode:
    """Measure this machine, about a minute, cache the profile, and print or write it."""
    options = device_options(values)
    if values.output is not None:
        check_place("--output", values.output)
    from flexbatch.policy.machines import profile_text
    from flexbatch.runtime.profile_cache import profile_machine
    from flexbatch.runtime.setup import disk_folder, open_device

    console = Console(quiet=values.quiet)
    with closing(LoadMeter(console)) as meter, closing(open_device(options)) as device:
        profile = profile_machine(device, disk_folder(options), rates=options.rates, progress=meter)
    text = profile_text(profile)
    if values.output is None:
        sys.stdout.write(text)
    else:
        data = text.encode()
        replace_file(values.output, [data], len(data))
        console.say(f"{values.output}: the profile of {profile.name}; give it to plan with --profile")
    return ExitCode.DONE
