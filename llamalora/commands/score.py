"""Scores anyone's predictions against gold, by exact mentions."""

import json
import sys

from ..cli import Parser, check_there
from ..task.score import format_table, score_files


def main(argv: list[str]) -> None:
    parser = Parser("score", "data/sample/test.PubTator.txt predictions.txt", description=__doc__)
    parser.add_argument("gold", metavar="GOLD", help="file of any corpus format, or folder of brat's")
    parser.add_argument("predicted", metavar="PRED", help="predictions about it; PubTator may lack the texts")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON and nothing else")
    arguments = parser.parse_args(argv)
    check_there(arguments.gold, arguments.predicted)
    result = score_files(arguments.gold, arguments.predicted)
    for note in result["notes"]:
        print(note, file=sys.stderr)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    print(format_table(result))
    if result["missing"]:
        print(f"{result['missing']} of {result['documents']} documents have no prediction")
