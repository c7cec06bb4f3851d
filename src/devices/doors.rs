//! Fuzz door of the devices at I/O ports (`docs/fuzzing.md`): a guest that reads and writes ports as the input says.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use arbitrary::Unstructured;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Bus, BusDevice, FwCfg, FwCfgState, I8042, Serial, SerialState, SleepRegisters};
use crate::sys::output::{ConsoleOutput, Sink};

/// Takes some bytes of what a console prints, and sometimes none.
struct Reader(u8);

impl Sink for Reader {
    fn write_now(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self.0.wrapping_add(7);
        if self.0.is_multiple_of(5) { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(bytes.len().min(3)) }
    }
}

struct Ports {
    bus: Bus,
    serial: Arc<Serial>,
    fw_cfg: Arc<FwCfg>,
}

impl Ports {
    fn new() -> Option<Ports> {
        let serial = Arc::new(Serial::new(Arc::new(ConsoleOutput::new(Box::new(Reader(0))).ok()?)).ok()?);
        let metadata = BTreeMap::from([("name".to_string(), "door".to_string())]);
        let fw_cfg = Arc::new(FwCfg::new(FwCfgState::new(metadata)).ok()?);
        let mut bus = Bus::default();
        let reset = I8042::new(EventFd::new(EFD_NONBLOCK).ok()?);
        let devices: [(u64, u64, Arc<dyn BusDevice>); 4] = [
            (0x60, 5, Arc::new(reset)),
            (0x3f8, 8, serial.clone()),
            (0x510, 2, fw_cfg.clone()),
            (0x600, 4, Arc::new(SleepRegisters::new(Box::new(|| {})))),
        ];
        for (base, len, device) in devices {
            bus.insert(base, len, device).ok()?;
        }
        Some(Ports { bus, serial, fw_cfg })
    }
}

/// A guest at the ports of the serial line, the keyboard controller, the metadata and the sleep registers.
pub fn ports(data: &[u8]) {
    let Some(ports) = Ports::new() else { return };
    let mut input = Unstructured::new(data);
    for _ in 0..512 {
        if input.is_empty() {
            break;
        }
        let _ = act(&ports, &mut input);
    }
    let state = ports.serial.save();
    assert!(ports.serial.restore(&state).is_ok(), "the serial line refuses its own state");
    assert!(ports.fw_cfg.restore(ports.fw_cfg.save()).is_ok(), "the metadata device refuses its own state");
}

fn act(ports: &Ports, input: &mut Unstructured) -> arbitrary::Result<()> {
    let which: u8 = input.arbitrary()?;
    let base = [0x60, 0x3f8, 0x510, 0x600][usize::from(which >> 6)];
    let address = base + u64::from(which >> 3 & 7);
    let len = [1, 2, 4, 8][usize::from(which & 3)];
    match input.arbitrary::<u8>()? % 8 {
        0..3 => {
            let bytes = input.bytes(len.min(input.len()))?;
            let _ = ports.bus.write(address, bytes);
        }
        3..6 => {
            let _ = ports.bus.read(address, &mut vec![0; len]);
        }
        6 => {
            let count = usize::from(which).min(input.len());
            let bytes = input.bytes(count)?;
            let room = ports.serial.room();
            if let Ok(taken) = ports.serial.receive(bytes) {
                assert!(taken <= bytes.len() && taken <= room.max(bytes.len()));
            }
        }
        _ => {
            ports.serial.output().drain();
            let state = input.bytes(usize::from(which).min(input.len()))?;
            if let Ok(state) = postcard::from_bytes::<SerialState>(state) {
                let _ = ports.serial.restore(&state);
            }
            if let Ok(state) = postcard::from_bytes::<FwCfgState>(state) {
                let _ = ports.fw_cfg.restore(state);
            }
        }
    }
    Ok(())
}
