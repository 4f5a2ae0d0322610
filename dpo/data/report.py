"""The data report: what was accepted, what was rejected and why, how long the texts are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo.data.schema import TRAIN, Pair
from dpo.data.validate import Rejected

_SAMPLE_ROWS = 5
_PERCENTILES = (5, 50, 95, 100)

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data report</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #8884; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8882; padding: .5rem;
      border-radius: .25rem; }
.pair { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); }
details { margin: .5rem 0; }
</style></head><body>
<h1>Data report</h1>
<p><strong>{{ "{:,}".format(f.pairs) }} pairs</strong> of {{ "{:,}".format(f.rows) }} rows are used:
{{ "{:,}".format(f.train_pairs) }} to train on, {{ "{:,}".format(f.test_pairs) }} held out to
measure with. {{ "{:,}".format(f.rejected) }} rows were rejected.</p>
<h2>Sources</h2>
<table><tr><th>source</th><th class="n">rows</th><th>fingerprint</th></tr>
{% for name, rows in f.rows_by_source.items() %}
<tr><td>{{ name }}</td><td class="n">{{ "{:,}".format(rows) }}</td>
<td><code>{{ sources[name][:16] }}</code></td></tr>
{% endfor %}</table>
{% if f.reasons %}<h2>Rejected rows</h2>
<table><tr><th>reason</th><th class="n">rows</th><th>for example</th></tr>
{% for reason, count in f.reasons.items() %}
<tr><td>{{ reason.replace("_", " ") }}</td><td class="n">{{ "{:,}".format(count) }}</td>
<td>{{ examples[reason] }}</td></tr>
{% endfor %}</table>
<p>All of them, with their reasons, are in <code>quarantine.jsonl</code> beside this report.</p>
{% endif %}
<h2>Lengths, in characters</h2>
<table><tr><th></th>{% for p in percentiles %}<th class="n">{{ p }} %</th>{% endfor %}</tr>
{% for name, values in lengths.items() %}<tr><td>{{ name }}</td>
{% for value in values %}<td class="n">{{ "{:,}".format(value) }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>The longer response is the preferred one in {{ "%.0f" | format(100 * longer_chosen) }} % of the
pairs{% if longer_chosen > 0.6 or longer_chosen < 0.4 %}: a model may learn the length instead of
the quality{% endif %}.</p>
<h2>Sample pairs</h2>
{% for pair in sample %}<details><summary>{{ pair.prompt[-100:] }}</summary>
<pre>{{ pair.prompt }}</pre><div class="pair">
<div><h3>preferred</h3><pre>{{ pair.chosen }}</pre></div>
<div><h3>rejected</h3><pre>{{ pair.rejected }}</pre></div></div></details>
{% endfor %}
</body></html>
"""


def write_report(
    report: dict[str, Any], pairs: Sequence[Pair], rejected: Sequence[Rejected], folder: Path
) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``."""
    from jinja2 import Environment

    lengths = {
        name: [int(v) for v in np.percentile([len(getattr(p, name)) for p in pairs], _PERCENTILES)]
        for name in ("prompt", "chosen", "rejected")
    }
    longer_chosen = float(np.mean([len(p.chosen) > len(p.rejected) for p in pairs]))
    report = {
        **report,
        "length_percentiles": list(_PERCENTILES),
        "lengths_characters": lengths,
        "longer_response_is_chosen": longer_chosen,
    }
    text = json.dumps(report, indent=1, sort_keys=True)
    (folder / "report.json").write_text(text, encoding="utf-8")
    environment = Environment(autoescape=True)
    html = environment.from_string(_TEMPLATE).render(
        f=report["figures"],
        sources=report["sources"],
        examples={item.reason: str(item)[:200] for item in reversed(rejected)},
        percentiles=_PERCENTILES,
        lengths=lengths,
        longer_chosen=longer_chosen,
        sample=[pair for pair in pairs if pair.split == TRAIN][:_SAMPLE_ROWS],
    )
    (folder / "report.html").write_text(html, encoding="utf-8", errors="replace")
