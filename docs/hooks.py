"""What mkdocs cannot do by itself: pages link to files beside docs/ (results, SECURITY.md), which the site gets too."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "benchmarks/results/**/*.json",
    "benchmarks/results/**/*.md",
    "benchmarks/results/**/*.png",
    "examples/*.py",
    "examples/*.ipynb",
    "kernels/README.md",
    "*.md",
)
UP = re.compile(r"\]\(\.\./(?=[\w.-])")  # a link from docs/ to the folder above it
DOWN = re.compile(r"\]\(docs/")  # and one from there into docs/


def on_files(files, config):
    """Add the files that pages may link to; README.md is the first page of the repository, not of the site."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if name != "README.md" and ".venv" not in path.parts:
                files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links between docs/ and the folder above it point to where both lie on the site: in one folder."""
    return (DOWN if (ROOT / page.file.src_uri).is_file() else UP).sub("](", markdown)
