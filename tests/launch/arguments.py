"""Arguments that have to get through to a worker as they are."""

# Whatever a shell might take for something else.
ODD = [
    "plain",
    "two words",
    "it's",
    'say "so"',
    "$HOME ${HOME} $(hostname) `hostname`",
    "*",
    "~",
    "a;b & c | d > e < f",
    "back\\slash",
    "",
    "--flag=[{path: '/mnt/b/ä b'}]",
    "!bang #hash",
    "two  spaces\ttab",
    "two\nlines",
]
WRITE_ARGUMENTS = (
    "import json, os, pathlib, sys;"
    "pathlib.Path(os.environ['HOME'], 'argv.json').write_text(json.dumps(sys.argv[1:]))"
)
