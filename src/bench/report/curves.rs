//! Curves over two axes of numbers.

use super::chart::{LEFT, Log, PLOT, Point, RIGHT, Series, TOP, WIDTH, legend, line, open, text};
use crate::bench::markup::escape;

/// The kind of the lower axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    Linear,
    /// Numbers that are not above 0 are left out.
    Logarithmic,
}

/// One point of a curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct At {
    pub x: f64,
    pub y: f64,
}

/// Curves; the left axis begins at 0.
pub struct Curves<'a> {
    pub title: &'a str,
    pub x_unit: &'a str,
    pub y_unit: &'a str,
    pub axis: Axis,
    pub series: &'a [Series],
    /// By series; in the order of `x`.
    pub curves: Vec<Vec<At>>,
}

/// Labels of a linear axis.
const TICKS: f64 = 6.0;

impl Curves<'_> {
    /// The drawing; `None` if there is nothing to draw.
    pub fn svg(&self) -> Option<String> {
        let is_drawn = |at: &&At| self.axis == Axis::Linear || at.x > 0.0;
        let xs: Vec<f64> = self.curves.iter().flatten().filter(is_drawn).map(|at| at.x).collect();
        let most_x = xs.iter().copied().reduce(f64::max)?;
        let most_y = self.curves.iter().flatten().map(|at| at.y).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
        let bottom = TOP + PLOT;
        let y = |value: f64| bottom - value / most_y * PLOT;
        let log = Log::over(&xs, LEFT, WIDTH - RIGHT)?;
        let linear = |value: f64| LEFT + value / most_x.max(f64::MIN_POSITIVE) * (WIDTH - LEFT - RIGHT);
        let legend_rows = self.series.len().div_ceil(5) as f64;
        let mut out = open(self.title, bottom + 44.0 + legend_rows * 16.0);
        for value in ticks(most_y) {
            out += &line(Point { x: LEFT, y: y(value) }, Point { x: WIDTH - RIGHT, y: y(value) }, "#ddd");
            out += &text(LEFT - 8.0, y(value) + 3.0, "end", &label(value));
        }
        out += &text(LEFT - 8.0, TOP - 12.0, "end", self.y_unit);
        let below = match self.axis {
            Axis::Linear => ticks(most_x).into_iter().map(|value| (linear(value), label(value))).collect(),
            Axis::Logarithmic => log.ticks(),
        };
        for (x, label) in below {
            out += &line(Point { x, y: bottom }, Point { x, y: bottom + 4.0 }, "#888");
            out += &text(x, bottom + 16.0, "middle", &label);
        }
        out += &text(WIDTH - RIGHT, bottom + 30.0, "end", self.x_unit);
        for (series, curve) in self.series.iter().zip(&self.curves) {
            let place = |at: &At| match self.axis {
                Axis::Linear => format!("{:.1},{:.1}", linear(at.x), y(at.y)),
                Axis::Logarithmic => format!("{:.1},{:.1}", log.x(at.x), y(at.y)),
            };
            let path: Vec<String> = curve.iter().filter(is_drawn).map(place).collect();
            out += &format!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\"><title>{}</title>\
                 </polyline>\n",
                path.join(" "),
                series.colour(),
                escape(&series.name)
            );
        }
        out += &legend(self.series, bottom + 48.0);
        Some(out + "</svg>\n")
    }
}

/// Round numbers from 0 to `most`.
fn ticks(most: f64) -> Vec<f64> {
    let rough = most / TICKS;
    let power = 10.0_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    (0..).map(|index| f64::from(index) * step).take_while(|value| *value <= most).collect()
}

fn label(value: f64) -> String {
    format!("{}", (value * 1e6).round() / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_drawn_on_both_axes() {
        let series = ["a<b", "c"].map(|name| Series { name: name.to_string(), colour: 0 });
        for axis in [Axis::Linear, Axis::Logarithmic] {
            let curves = vec![vec![At { x: 0.0, y: 1.0 }, At { x: 10.0, y: 70.0 }], vec![At { x: 5.0, y: 0.0 }]];
            let svg = Curves { title: "T", x_unit: "s", y_unit: "MiB", axis, series: &series, curves }.svg().unwrap();
            assert_eq!(svg.matches("<polyline").count(), 2);
            assert!(svg.contains("a&lt;b") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
        let none = Curves { title: "T", x_unit: "", y_unit: "", axis: Axis::Linear, series: &[], curves: vec![] };
        assert!(none.svg().is_none());
        assert_eq!(ticks(70.0), [0.0, 20.0, 40.0, 60.0]);
        assert_eq!(ticks(0.6), [0.0, 0.1, 0.2, 0.30000000000000004, 0.4, 0.5, 0.6000000000000001][..6]);
    }
}
