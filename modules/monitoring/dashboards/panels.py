"""The few kinds of panels that the dashboards are made of: a dashboard is a list of titles, units and queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from grafana_foundation_sdk.builders import (
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.common import (
    HeatmapCellLayout,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

if TYPE_CHECKING:
    from grafana_foundation_sdk.cog.builder import Builder
    from grafana_foundation_sdk.models.dashboard import Panel

PanelBuilder: TypeAlias = "Builder[Panel]"

TAG = "pascaline"
DATA_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
HEIGHT = 8
FULL, HALF, THIRD, QUARTER = 24, 12, 8, 6
NUMBER_HEIGHT = 4

BYTES, PERCENT, RATIO = units.BytesIEC, units.Percent, units.PercentUnit
SECONDS, WATTS, CELSIUS, HERTZ, COUNT = units.Seconds, units.Watt, units.Celsius, units.Hertz, units.Short
BYTES_PER_SECOND = units.BytesPerSecondIEC
TOKENS, TOKENS_PER_SECOND, TOKENS_PER_JOULE = "suffix:tok", "suffix:tok/s", "suffix:tok/J"
NONE = units.NoUnit


def dashboard_of(title: str, uid: str, description: str) -> dashboard.Dashboard:
    """Begin a dashboard: the last hour, refreshed while it is watched, the data source and the host to choose."""
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .time("now-1h", "now")
        .refresh("30s")
        .readonly()
        .link(dashboard.DashboardLink(TAG).type(DashboardLinkType.DASHBOARDS).tags([TAG]).as_dropdown(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )


def variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """Return a variable whose values a label query lists; several or all of them can be chosen."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(DATA_SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def lines(title: str, unit: str, *queries: tuple[str, str], span: int = HALF, stacked: bool = False) -> PanelBuilder:
    """Return curves over time; a query is an expression and its legend."""
    panel = (
        timeseries.Panel()
        .title(title)
        .unit(unit)
        .min(0)
        .datasource(DATA_SOURCE)
        .height(HEIGHT)
        .span(span)
        .fill_opacity(10)
        .legend(
            VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
        )
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if stacked:
        panel = panel.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(40)
    for number, (expression, legend) in enumerate(queries):
        panel = panel.with_target(_query(expression, number).legend_format(legend).range())
    return panel


def number(
    title: str, unit: str, expression: str, *, red_from: float | None = None, span: int = QUARTER
) -> PanelBuilder:
    """Return the last value, large; red from a value on."""
    steps = [Threshold(color="green", value=None)]
    if red_from is not None:
        steps.append(Threshold(color="red", value=red_from))
    return (
        stat.Panel()
        .title(title)
        .unit(unit)
        .datasource(DATA_SOURCE)
        .height(NUMBER_HEIGHT)
        .span(span)
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_query(expression, 0).range())
    )


def heat(title: str, unit: str, histogram: str, *, span: int = HALF) -> PanelBuilder:
    """Return how the observations of a Prometheus histogram spread over its buckets, over time."""
    expression = f"sum by (le) (increase({histogram}[$__rate_interval]))"
    return (
        heatmap.Panel()
        .title(title)
        .unit(unit)
        .datasource(DATA_SOURCE)
        .height(HEIGHT)
        .span(span)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .rows_frame(heatmap.RowsHeatmapOptions().layout(HeatmapCellLayout.AUTO))
        .show_tooltip()
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Turbo").steps(64))
        .with_target(_query(expression, 0).format(PromQueryFormat.HEATMAP).legend_format("{{le}}").range())
    )


def states(title: str, expression: str, legend: str, *, span: int = FULL) -> PanelBuilder:
    """Return a band of states over time; each series is one state, drawn while it is 1."""
    return (
        statetimeline.Panel()
        .title(title)
        .unit(NONE)
        .datasource(DATA_SOURCE)
        .height(HEIGHT)
        .span(span)
        .thresholds(
            dashboard.ThresholdsConfig()
            .mode(ThresholdsMode.ABSOLUTE)
            .steps([Threshold(color="transparent", value=None), Threshold(color="blue", value=1)])
        )
        .with_target(_query(expression, 0).legend_format(legend).range())
    )


def listing(title: str, *expressions: str, span: int = FULL) -> PanelBuilder:
    """Return the series that match now, a row each, their labels as columns."""
    panel = table.Panel().title(title).unit(NONE).datasource(DATA_SOURCE).height(HEIGHT).span(span)
    for number_of_query, expression in enumerate(expressions):
        panel = panel.with_target(_query(expression, number_of_query).format(PromQueryFormat.TABLE).instant())
    return panel


def _query(expression: str, number_of_query: int) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(expression).ref_id(chr(ord("A") + number_of_query)).datasource(DATA_SOURCE)
