//! `pagerank`: a Barabási–Albert graph and the ranks of its nodes, as FunctionBench's `graph_pagerank` with igraph.
//!
//! Barabási and Albert, Science 286 (1999): each new node is joined to m others, chosen by their degree. Page and Brin
//! 1998: power iteration with damping 0.85.

use alloc::vec;
use alloc::vec::Vec;

use super::random::Random;
use super::runtime::Pace;
use crate::digest::Digest;

pub const NODES_A: u64 = 90_000;
pub const NODES_B: u64 = 100_000;
/// Edges that each new node brings.
pub const M: usize = 10;
const DAMPING: f64 = 0.85;
/// The ranks are final when they change by less in sum.
const TOLERANCE: f64 = 1e-10;
const ITERATIONS_MAX: u32 = 200;

/// Neighbours of every node: those of `i` are `targets[starts[i]..starts[i + 1]]`.
pub struct Graph {
    starts: Vec<u32>,
    targets: Vec<u32>,
}

impl Graph {
    /// A graph of `nodes` nodes, more than [`M`].
    pub fn barabasi_albert(nodes: u64, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let nodes = nodes as usize;
        // Every edge as two ends; an end drawn from here is a node drawn by its degree.
        let mut ends: Vec<u32> = Vec::with_capacity(2 * M * (nodes - M));
        let mut chosen: Vec<u32> = (0..M as u32).collect();
        for node in M..nodes {
            for &target in &chosen {
                ends.extend([node as u32, target]);
            }
            chosen.clear();
            while chosen.len() < M {
                let target = ends[random.below(ends.len() as u64) as usize];
                if !chosen.contains(&target) {
                    chosen.push(target);
                }
            }
        }
        Self::from_ends(nodes, &ends)
    }

    fn from_ends(nodes: usize, ends: &[u32]) -> Self {
        let mut starts = vec![0_u32; nodes + 1];
        ends.iter().for_each(|node| starts[*node as usize + 1] += 1);
        (0..nodes).for_each(|node| starts[node + 1] += starts[node]);
        let mut next = starts.clone();
        let mut targets = vec![0; ends.len()];
        for &[a, b] in ends.as_chunks::<2>().0 {
            for (from, to) in [(a, b), (b, a)] {
                targets[next[from as usize] as usize] = to;
                next[from as usize] += 1;
            }
        }
        Self { starts, targets }
    }

    pub fn nodes(&self) -> usize {
        self.starts.len() - 1
    }

    fn neighbours(&self, node: usize) -> &[u32] {
        &self.targets[self.starts[node] as usize..self.starts[node + 1] as usize]
    }

    /// The ranks; their sum is 1. Every node must have a neighbour.
    pub fn pagerank(&self, pace: &mut Pace) -> Vec<f64> {
        // The expected number of rounds with damping 0.85, only for the progress.
        const EXPECTED: u64 = 24;
        let nodes = self.nodes();
        let mut ranks = vec![1.0 / nodes as f64; nodes];
        let mut shares = vec![0.0; nodes];
        for iteration in 1..=ITERATIONS_MAX {
            for (node, share) in shares.iter_mut().enumerate() {
                *share = ranks[node] / self.neighbours(node).len() as f64;
            }
            let mut change = 0.0;
            for (node, rank) in ranks.iter_mut().enumerate() {
                let sum: f64 = self.neighbours(node).iter().map(|neighbour| shares[*neighbour as usize]).sum();
                let new = (1.0 - DAMPING) / nodes as f64 + DAMPING * sum;
                let moved = new - *rank;
                change += if moved < 0.0 { -moved } else { moved };
                *rank = new;
            }
            pace.at(u64::from(iteration), EXPECTED);
            if change < TOLERANCE {
                break;
            }
        }
        ranks
    }
}

/// Makes the graph and ranks it; returns the digest of the ranks.
pub fn run(nodes: u64, seed: u64, pace: &mut Pace) -> u64 {
    let graph = Graph::barabasi_albert(nodes, seed);
    let mut digest = Digest::new();
    graph.pagerank(pace).iter().for_each(|rank| digest.word(rank.to_bits()));
    digest.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::runtime::Touches;

    fn pace() -> Pace<'static> {
        Pace::begin(None, Touches { pages: 0, written_percent: 0 }, 0, 0)
    }

    #[test]
    fn graph_has_m_edges_for_each_new_node_and_a_few_hubs() {
        let graph = Graph::barabasi_albert(2000, 1);
        assert_eq!(graph.targets.len(), 2 * M * (2000 - M));
        let mut degrees: Vec<usize> = (0..2000).map(|node| graph.neighbours(node).len()).collect();
        assert!(degrees[M..].iter().all(|degree| *degree >= M));
        degrees.sort_unstable();
        // A power law, not a bell curve: the largest degree is far from the median.
        assert!(degrees[1999] > 8 * degrees[1000], "{} {}", degrees[1999], degrees[1000]);
    }

    #[test]
    fn ranks_sum_to_one_and_equal_those_of_the_dense_iteration() {
        let graph = Graph::barabasi_albert(300, 2);
        let ranks = graph.pagerank(&mut pace());
        assert!((ranks.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        // The matrix, its columns the chances to go elsewhere, written out and applied until nothing moves.
        let mut dense = vec![vec![0.15 / 300.0; 300]; 300];
        for (from, to) in (0..300).flat_map(|from| graph.neighbours(from).iter().map(move |to| (from, *to as usize))) {
            dense[to][from] += 0.85 / graph.neighbours(from).len() as f64;
        }
        let mut reference = vec![1.0 / 300.0; 300];
        for _ in 0..300 {
            reference = dense.iter().map(|row| row.iter().zip(&reference).map(|(m, r)| m * r).sum()).collect();
        }
        assert!(ranks.iter().zip(&reference).all(|(rank, other)| (rank - other).abs() < 1e-10));
    }

    #[test]
    fn star_is_ranked_as_worked_out_by_hand() {
        // Hub 0 and three leaves: hub = 0.15/4 + 0.85·(3 leaves), leaf = 0.15/4 + 0.85·hub/3.
        let graph = Graph::from_ends(4, &[0, 1, 0, 2, 0, 3]);
        let ranks = graph.pagerank(&mut pace());
        let hub = (0.0375 + 0.85 * 3.0 * 0.0375) / (1.0 - 0.85 * 0.85);
        assert!((ranks[0] - hub).abs() < 1e-9, "{ranks:?}");
    }
}
