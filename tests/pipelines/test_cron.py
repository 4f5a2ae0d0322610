"""Set times, by the rules of robfig/cron 1.2 (parser.go and spec.go), which Kubeflow asks."""

import pytest

from dpo.errors import ConfigError
from pipelines.cron import check_cron


@pytest.mark.parametrize(
    "cron",
    [
        "0 0 3 * * *",
        "59 59 23 31 12 6",
        "*/15 0-30/10 5/3 ? JAN-mar,7 Mon-FRI",
        "0 0 3 29 2 *",
        "0 0 3 31 2 MON",
        "0 0 3 31 2,3 ?",
        "@daily",
        "@every 6h30m",
    ],
)
def test_times_that_come(cron):
    check_cron(cron)


@pytest.mark.parametrize(
    ("cron", "why"),
    [
        ("0 3 * * *", "has 5 fields"),
        ("60 0 3 * * *", "'60' in the schedule '60 0 3 * * *' is no second (0 to 59)"),
        ("0 61 * * * *", "is no minute (0 to 59)"),
        ("0 0 24 * * *", "is no hour (0 to 23)"),
        ("0 0 3 0 * *", "is no day of the month (1 to 31)"),
        ("0 0 3 * 13 *", "is no month (1 to 12)"),
        # Sunday is 0 there
        ("0 0 3 * * 7", "is no day of the week (0 to 6)"),
        ("0 0 3 * * monday", "is no day of the week"),
        ("0 30-10 3 * * *", "'30-10' in the schedule"),
        ("0 */0 3 * * *", "is no minute"),
        ("0 5, 3 * * *", "'5,' in the schedule"),
        ("0 -5 3 * * *", "'-5' in the schedule"),
        ("0 1-2-3 3 * * *", "is no minute"),
        ("0 0 3 31 2 *", "names a day that never comes"),
        ("0 0 3 31 4,jun *", "names a day that never comes"),
    ],
)
def test_times_that_do_not(cron, why):
    with pytest.raises(ConfigError) as refused:
        check_cron(cron)
    assert why in refused.value.found
    assert "0 0 3 * * *" in refused.value.fix
