"""A view inside a notebook's HTML output: plain HTML everywhere, and the view in its place where scripts run.

For results that are to be read in a saved notebook. A widget needs its kernel, and without one JupyterLab says "model
not found" even if a picture lies beside it. Such HTML needs none: where scripts run (JupyterLab, VS Code, nbconvert's
pages) it becomes the view of an exported page, in the page's own colours; where they do not (GitHub, nbviewer, a
notebook that is not trusted) the plain part stays.
"""

from collections.abc import Mapping
from typing import Any

from sqviz.widgets.view import View, plain_state, read_files, script_json


def inline(kind: type[View], state: Mapping[str, Any], plain: str) -> str:
    """HTML that shows `plain`, and in its place a view wherever scripts run.

    Args:
        kind: of the view.
        state: all its traits, as `page_state` gives them. No widget is made, so none is left behind.
        plain: HTML without scripts.
    """
    return f"""<div class="sqviz-inline">
<div class="sqviz-plain">{plain}</div>
<style>
{kind._css}
</style>
<script>
{{
const script = document.currentScript;
const module = {script_json(str(kind._esm))};
const state = {script_json(plain_state(state))};
{read_files(("page_model.js", "inline.js"))}
}}
</script>
</div>"""
