# SPDX-License-Identifier: MIT
"""Merging expositions: what several services, Dovecot and a text file say."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from chatmaild.openmetrics import merge

# as Dovecot 2.4.1 says it, with the lines that are not OpenMetrics
DOVECOT = """\
# HELP process_start_time_seconds Timestamp of service start
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1795493204
# HELP dovecot_build Dovecot build information
# TYPE dovecot_build info
dovecot_build_info{version="2.4.1-4",revision="7d8c0e5759"} 1
# HELP dovecot_auth Total number of all events of this kind
# TYPE dovecot_auth counter
dovecot_auth_total{success="yes"} 1
dovecot_auth_total{success=""} 1
dovecot_auth_count 2
# HELP dovecot_delivery Histogram
# TYPE dovecot_delivery histogram
dovecot_delivery_bucket{le="0.000010"} 0
dovecot_delivery_bucket{le="+Inf"} 3
dovecot_delivery_sum 0.5
dovecot_delivery_count 3
# EOF

"""


def test_families_of_several_services_are_put_together():
    first = '# TYPE chatmail_a counter\n# HELP chatmail_a A.\nchatmail_a_total{s="x"} 1\n# EOF\n'
    second = '# TYPE chatmail_a counter\n# HELP chatmail_a B.\nchatmail_a_total{s="y"} 2\n# EOF\n'
    assert merge([("chatmail_", first), ("chatmail_", second)]).splitlines() == [
        "# TYPE chatmail_a counter",
        "# HELP chatmail_a A.",
        'chatmail_a_total{s="x"} 1',
        'chatmail_a_total{s="y"} 2',
        "# EOF",
    ]


def test_what_dovecot_says_becomes_valid():
    lines = merge([("dovecot_", DOVECOT)]).splitlines()
    assert "dovecot_auth_count 2" not in lines
    assert 'dovecot_auth_total{success=""} 1' in lines
    assert 'dovecot_delivery_bucket{le="+Inf"} 3' in lines and "dovecot_delivery_sum 0.5" in lines
    assert not any(line.startswith("process_") for line in lines)
    assert lines[-1] == "# EOF"
    families = {item.name: item for item in text_string_to_metric_families("\n".join(lines) + "\n")}
    assert families["dovecot_auth"].type == "counter"
    assert families["dovecot_delivery"].type == "histogram"


def test_the_older_text_of_a_file_is_understood():
    text = (
        "# HELP chatmail_runs_total Runs.\n# TYPE chatmail_runs_total counter\n"
        "chatmail_runs_total 3 1700000000000\n"
        "# TYPE chatmail_size gauge\nchatmail_size 1.5e+06\n"
    )
    assert merge([("chatmail_", text)]).splitlines() == [
        "# TYPE chatmail_runs counter",
        "# HELP chatmail_runs Runs.",
        "chatmail_runs_total 3",
        "# TYPE chatmail_size gauge",
        "chatmail_size 1.5e+06",
        "# EOF",
    ]


def test_another_type_or_a_second_sample_of_the_same_name_is_left_out():
    first = "# TYPE chatmail_a gauge\nchatmail_a 1\nchatmail_a 7\n"
    second = "# TYPE chatmail_a counter\nchatmail_a_total 2\n"
    assert merge([("chatmail_", first), ("chatmail_", second)]).splitlines() == [
        "# TYPE chatmail_a gauge",
        "chatmail_a 1",
        "# EOF",
    ]


@given(
    st.lists(
        st.sampled_from(
            [
                "# TYPE chatmail_a counter",
                "# TYPE chatmail_a gauge",
                "# HELP chatmail_a",
                "chatmail_a 1",
                'chatmail_a_total{x="1"} 2',
                'chatmail_a_total{x="1} 2',
                "chatmail_a_total NaN",
                "# EOF",
                "",
            ]
        )
        | st.text(max_size=20)
    )
)
def test_whatever_comes_the_result_is_well_formed(lines):
    merged = merge([("chatmail_", "\n".join(lines))])
    assert merged.endswith("# EOF\n") and merged.count("# EOF") == 1
    seen = [line for line in merged.splitlines() if not line.startswith("#")]
    assert len(seen) == len(set(seen))
    assert merge([("chatmail_", merged)]) == merged
