//! Charts as SVG, without scripts, fonts or network access.

use crate::bench::markup::escape;

/// Colours that colour-blind people can tell apart (Okabe and Ito), then darker ones.
const COLOURS: [&str; 12] = [
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c7a00", "#444444", "#005a3c", "#7a3b69",
    "#a03000", "#888888",
];

pub(super) const LEFT: f64 = 150.0;
pub(super) const RIGHT: f64 = 20.0;
pub(super) const WIDTH: f64 = 900.0;

/// A series of values: its name, and its colour, the same in all charts.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub colour: usize,
}

impl Series {
    pub(super) fn colour(&self) -> &'static str {
        COLOURS[self.colour % COLOURS.len()]
    }
}

/// One bar: a median and its range.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

/// Groups of horizontal bars on a logarithmic axis.
pub struct Bars<'a> {
    pub title: &'a str,
    pub unit: &'a str,
    pub groups: &'a [String],
    pub series: &'a [Series],
    /// By group, then by series.
    pub bars: Vec<Vec<Option<Bar>>>,
}

const BAR: f64 = 9.0;
const GAP: f64 = 10.0;
pub(super) const TOP: f64 = 40.0;

impl Bars<'_> {
    /// The drawing; `None` if there is nothing to draw.
    pub fn svg(&self) -> Option<String> {
        let all: Vec<f64> = self.bars.iter().flatten().flatten().map(|bar| bar.value).filter(|v| *v > 0.0).collect();
        let axis = Log::over(&all, LEFT, WIDTH - RIGHT)?;
        let group_height = self.series.len() as f64 * BAR + GAP;
        let bottom = TOP + self.groups.len() as f64 * group_height;
        let legend_rows = self.series.len().div_ceil(5) as f64;
        let mut out = open(self.title, bottom + 40.0 + legend_rows * 16.0);
        for (x, label) in axis.ticks() {
            out += &line(Point { x, y: TOP - 6.0 }, Point { x, y: bottom }, "#ddd");
            out += &text(x, bottom + 12.0, "middle", &label);
        }
        out += &text(WIDTH - RIGHT, bottom + 26.0, "end", self.unit);
        for (index, (group, bars)) in self.groups.iter().zip(&self.bars).enumerate() {
            let top = TOP + index as f64 * group_height;
            out += &text(LEFT - 8.0, top + group_height / 2.0, "end", group);
            for (number, (series, bar)) in self.series.iter().zip(bars).enumerate() {
                let Some(bar) = bar.filter(|bar| bar.value > 0.0) else { continue };
                let y = top + number as f64 * BAR;
                let end = axis.x(bar.value);
                out += &format!(
                    "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"><title>{}: {} {:.3} \
                     ({:.3} to {:.3}) {}</title></rect>\n",
                    (end - LEFT).max(1.0),
                    BAR - 1.0,
                    series.colour(),
                    escape(group),
                    escape(&series.name),
                    bar.value,
                    bar.low,
                    bar.high,
                    escape(self.unit),
                );
                let middle = y + (BAR - 1.0) / 2.0;
                out += &line(Point { x: axis.x(bar.low), y: middle }, Point { x: axis.x(bar.high), y: middle }, "#000");
            }
        }
        out += &legend(self.series, bottom + 44.0);
        Some(out + "</svg>\n")
    }
}

/// Lines over a numbered axis.
pub struct Lines<'a> {
    pub title: &'a str,
    pub x_unit: &'a str,
    pub y_unit: &'a str,
    pub points: &'a [String],
    pub series: &'a [Series],
    /// By series, then by point.
    pub values: Vec<Vec<Option<f64>>>,
}

pub(super) const PLOT: f64 = 260.0;

impl Lines<'_> {
    /// The drawing; `None` if there is nothing to draw.
    pub fn svg(&self) -> Option<String> {
        let all: Vec<f64> = self.values.iter().flatten().flatten().copied().filter(|v| *v > 0.0).collect();
        let axis = Log::over(&all, 0.0, PLOT)?;
        let bottom = TOP + PLOT;
        let y = |value: f64| bottom - axis.x(value);
        let step = (WIDTH - LEFT - RIGHT) / self.points.len() as f64;
        let x = |index: usize| LEFT + step * (index as f64 + 0.5);
        let legend_rows = self.series.len().div_ceil(5) as f64;
        let mut out = open(self.title, bottom + 44.0 + legend_rows * 16.0);
        for (at, label) in axis.ticks() {
            out += &line(Point { x: LEFT, y: bottom - at }, Point { x: WIDTH - RIGHT, y: bottom - at }, "#ddd");
            out += &text(LEFT - 8.0, bottom - at + 3.0, "end", &label);
        }
        out += &text(LEFT - 8.0, TOP - 12.0, "end", self.y_unit);
        for (index, point) in self.points.iter().enumerate() {
            out += &text(x(index), bottom + 14.0, "middle", point);
        }
        out += &text(WIDTH - RIGHT, bottom + 28.0, "end", self.x_unit);
        for (series, values) in self.series.iter().zip(&self.values) {
            let points: Vec<(f64, f64, f64)> = values
                .iter()
                .enumerate()
                .filter_map(|(index, value)| value.filter(|v| *v > 0.0).map(|value| (x(index), y(value), value)))
                .collect();
            let path: Vec<String> = points.iter().map(|(x, y, _)| format!("{x:.1},{y:.1}")).collect();
            out += &format!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"/>\n",
                path.join(" "),
                series.colour()
            );
            for (x, y, value) in points {
                out += &format!(
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{}\"><title>{}: {value:.3} \
                     {}</title></circle>\n",
                    series.colour(),
                    escape(&series.name),
                    escape(self.y_unit),
                );
            }
        }
        out += &legend(self.series, bottom + 48.0);
        Some(out + "</svg>\n")
    }
}

/// A logarithmic axis.
pub(super) struct Log {
    least: f64,
    most: f64,
    from: f64,
    to: f64,
}

impl Log {
    /// From the power of ten below the least value (or half of it) to a little above the greatest.
    pub(super) fn over(values: &[f64], from: f64, to: f64) -> Option<Log> {
        let least = values.iter().copied().reduce(f64::min)?;
        let most = values.iter().copied().reduce(f64::max)?;
        Some(Log { least: least / 2.0, most: most * 1.2, from, to })
    }

    pub(super) fn x(&self, value: f64) -> f64 {
        let share = (value / self.least).ln() / (self.most / self.least).ln();
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// 1, 2 and 5 times powers of ten, with their labels.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let mut ticks = Vec::new();
        let mut power = 10.0_f64.powi(self.least.log10().floor() as i32);
        while power <= self.most {
            for factor in [1.0, 2.0, 5.0] {
                let value = power * factor;
                if (self.least..=self.most).contains(&value) {
                    ticks.push((self.x(value), format!("{}", (value * 1e6).round() / 1e6)));
                }
            }
            power *= 10.0;
        }
        ticks
    }
}

pub(super) fn open(title: &str, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\" font-family=\"system-ui, sans-serif\" font-size=\"11\">\n<title>{0}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"18\" font-size=\"14\" font-weight=\"600\">{0}</text>\n",
        escape(title)
    )
}

pub(super) fn text(x: f64, y: f64, anchor: &str, what: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>\n", escape(what))
}

/// A place in a chart, pixels from its upper left corner.
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
}

pub(super) fn line(from: Point, to: Point, stroke: &str) -> String {
    format!(
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{stroke}\"/>\n",
        from.x, from.y, to.x, to.y
    )
}

pub(super) fn legend(series: &[Series], top: f64) -> String {
    let mut out = String::new();
    for (index, series) in series.iter().enumerate() {
        let x = LEFT + (index % 5) as f64 * 145.0;
        let y = top + (index / 5) as f64 * 16.0;
        out +=
            &format!("<rect x=\"{x}\" y=\"{}\" width=\"10\" height=\"10\" fill=\"{}\"/>\n", y - 9.0, series.colour());
        out += &text(x + 14.0, y, "start", &series.name);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| name.to_string()).collect()
    }

    #[test]
    fn bars_and_points_are_drawn_for_what_there_is() {
        let groups = names(&["a<b", "c"]);
        let series = [("x", 3), ("y", 5)].map(|(name, colour)| Series { name: name.to_string(), colour });
        let bar = |value| Some(Bar { value, low: value * 0.9, high: value * 1.1 });
        let bars = vec![vec![bar(1.0), bar(20.0)], vec![None, bar(300.0)]];
        let svg = Bars { title: "T", unit: "ms", groups: &groups, series: &series, bars }.svg().unwrap();
        assert_eq!(svg.matches("<title>a&lt;b: ").count() + svg.matches("<title>c: ").count(), 3);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let values = vec![vec![Some(1.0), None], vec![Some(2.0), Some(0.0)]];
        let lines = Lines { title: "T", x_unit: "n", y_unit: "MiB", points: &groups, series: &series, values };
        let svg = lines.svg().unwrap();
        assert_eq!(svg.matches("<circle").count(), 2);
        let bars = vec![vec![None, None], vec![None, None]];
        assert!(Bars { title: "T", unit: "ms", groups: &groups, series: &series, bars }.svg().is_none());
    }

    #[test]
    fn one_value_alone_has_an_axis() {
        let axis = Log::over(&[5.0], 0.0, 100.0).unwrap();
        assert!(axis.x(5.0) > 0.0 && axis.x(5.0) < 100.0);
        assert!(!axis.ticks().is_empty());
    }
}
