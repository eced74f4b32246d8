"""The user study (Section 5.6, Table 2, Figure 11): which of two rows of images is more diverse, truer, more appealing?

    python study.py make evaluation --pair ImageReFL:ReFL     # evaluation: an output folder of evaluate.py
    python study.py count study                               # when answers-*.json have come back into it

`make` writes a page for each person, a single file that works without a server and does not tell the methods. `vote`
lets rewards answer the pages, from the scores that evaluate.py has measured. `count` prints Table 2 with intervals.
"""

from report.options import study_args as parse_args

if __name__ == "__main__":
    ARGS = parse_args(description=__doc__)  # before the slow imports, so that --help answers at once

from pathlib import Path

from report import study_count, study_page, study_voters
from report.options import name_list
from utils import cli


def main(args) -> None:
    """Raises ValueError or OSError for bad input."""
    if args.command == "make":
        output, people = Path(args.output_dir), args.people or args.raters
        cli.check_writable(output)
        folders = [Path(folder) for folder in args.evaluations]
        print(study_page.make(folders, args.pair, output, args.limit, args.raters, people, args.seed))
    elif args.command == "vote":
        evaluations = [Path(folder) for folder in args.evaluations]
        for path in study_voters.vote(Path(args.study), evaluations, name_list(args.voters)):
            print(f"written: {path}")
    else:
        print(study_count.count(Path(args.study), [Path(path) for path in args.answers]))


if __name__ == "__main__":
    cli.run(main, ARGS)
