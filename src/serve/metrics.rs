//! `/metrics`: counters and gauges in Prometheus' text format (exposition format 0.0.4).

use std::fmt::Write;
use std::sync::atomic::Ordering;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;

use super::counters::head;
use super::daemon::{Daemon, Shared};
use super::standby;

/// Counters and gauges in Prometheus' text format.
#[utoipa::path(get, path = "/metrics", tag = "service",
    responses((status = 200,
        description = "All metrics in Prometheus' text format", body = String, content_type = "text/plain")))]
pub(super) async fn get_metrics(State(daemon): State<Shared>) -> impl IntoResponse {
    let mut text = String::new();
    let mut standing_by = Vec::new();
    let known: Vec<_> = daemon.functions().values().cloned().collect();
    for function in known.into_iter().filter(|function| function.standby.is_some()) {
        let kib = standby::memory_kib(&daemon, &function.func_name).await;
        standing_by.push((function.func_name, kib));
    }
    let (running, queued) = daemon.gate.load();
    let taken = daemon.vms.taken();
    let written = daemon.counters.write(&mut text).and_then(|()| {
        for (name, what, value) in [
            (
                "tvmm_vms_memory_mib",
                "Guest memory of VMs that live or are being made, and of kept processes, MiB",
                taken.memory_mib as usize,
            ),
            ("tvmm_shells", "VM processes kept ready", daemon.shells.len()),
            (
                "tvmm_shells_in_namespaces",
                "VM processes kept ready in network namespaces",
                daemon.shells.count_in_namespaces(),
            ),
            ("tvmm_spares", "Processes of finished VMs kept for other VMs", daemon.vms.spares()),
            ("tvmm_invocations_running", "Invocations that run", running),
            ("tvmm_invocations_queued", "Invocations that wait for their turn", queued),
            ("tvmm_functions", "Functions known", daemon.functions().len()),
            ("tvmm_snapshots", "Snapshots kept", daemon.snapshots().len()),
        ] {
            head(&mut text, name, "gauge", what)?;
            writeln!(text, "{name} {value}")?;
        }
        write_standby(&mut text, &daemon, &standing_by)?;
        write_idle(&mut text, &daemon)?;
        daemon.standby.events.write(&mut text)?;
        daemon.repurposes.write(&mut text)?;
        daemon.access.write(&mut text)?;
        head(&mut text, "tvmm_traces_lost_total", "counter", "Traces that did not get into the trace file")?;
        writeln!(text, "tvmm_traces_lost_total {}", daemon.traces.lost.load(Ordering::Relaxed))?;
        let Some(exporter) = &daemon.traces.exporter else { return Ok(()) };
        for (name, what, count) in [
            ("tvmm_otlp_traces_sent_total", "Traces that the collector has taken", exporter.counts().sent()),
            ("tvmm_otlp_traces_lost_total", "Traces that it has not", exporter.counts().lost()),
        ] {
            head(&mut text, name, "counter", what)?;
            writeln!(text, "{name} {count}")?;
        }
        Ok(())
    });
    match written {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text),
        // Writing to a String cannot fail.
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], String::new()),
    }
}

fn write_standby(text: &mut String, daemon: &Daemon, standing_by: &[(String, u64)]) -> std::fmt::Result {
    head(text, "tvmm_standby_ready", "gauge", "VMs that stand by, by function")?;
    for (name, _) in standing_by {
        writeln!(text, "tvmm_standby_ready{{function=\"{name}\"}} {}", standby::count(daemon, name))?;
    }
    head(text, "tvmm_standby_memory_bytes", "gauge", "Local memory of VMs that stand by, by function")?;
    for (name, kib) in standing_by {
        writeln!(text, "tvmm_standby_memory_bytes{{function=\"{name}\"}} {}", kib << 10)?;
    }
    Ok(())
}

fn write_idle(text: &mut String, daemon: &Daemon) -> std::fmt::Result {
    let help = "VMs by state; also those that are being made, and kept processes of finished VMs";
    head(text, "tvmm_vms", "gauge", help)?;
    for (state, count) in daemon.vms.count_by_state() {
        writeln!(text, "tvmm_vms{{state=\"{state}\"}} {count}")?;
    }
    let help = "Disk space of suspended VMs, and of those that were woken and live, bytes";
    head(text, "tvmm_suspended_bytes", "gauge", help)?;
    writeln!(text, "tvmm_suspended_bytes {}", daemon.vms.suspended.bytes())?;
    head(text, "tvmm_spilled_bytes", "gauge", "Space of the files of spilled VMs, bytes")?;
    writeln!(text, "tvmm_spilled_bytes {}", daemon.vms.spill_bytes())?;
    daemon.idle.write(text)
}
