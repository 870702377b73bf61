"""The HTML report of a checkpoint: one page that opens offline, in a light or dark browser.

`facts` gathers what the page says, in a bounded number of values; `charts` makes Vega-Lite charts
of them with Vega-Altair, `page` puts all into a template. Only `charts` and `page` import what the
extra ``[report]`` installs, and nothing imports them before a report is asked for. All ids, errors
and paths are hostile; the template escapes them. The page permits its browser no network request
and no script but its own.

**Runs in:** driver, command line. Start reading at `page.write_report`.
"""
