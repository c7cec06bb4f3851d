//! COM1, a 16550A (National Semiconductor PC16550D datasheet, section 8).
//!
//! A port access may cost 27 us (an exit to the VMM), so there are as few as the chip allows: one
//! status read per received byte, one per burst of 16 sent bytes.

use crate::arch::port;

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = 0x3f9;
const FIFO_CONTROL: u16 = 0x3fa;
const LINE_CONTROL: u16 = 0x3fb;
const MODEM_CONTROL: u16 = 0x3fc;
const LINE_STATUS: u16 = 0x3fd;

const IER_RECEIVED: u8 = 0x01;
const FCR_ENABLE_AND_CLEAR: u8 = 0x07; // interrupt on the first byte
const LCR_8N1: u8 = 0x03;
const LCR_DIVISOR: u8 = 0x80;
const MCR_DTR_RTS_OUT2: u8 = 0x0b; // OUT2 gates the interrupt line on a PC
const LSR_DATA_READY: u8 = 0x01;
const LSR_ERRORS: u8 = 0x1e; // overrun, parity, framing, break
const LSR_THR_EMPTY: u8 = 0x20;
const LSR_IDLE: u8 = 0x40;

/// The bytes that an empty transmitter takes.
const FIFO_BYTES: usize = 16;
/// Polls after which a transmitter counts as broken: never hang.
const POLLS_MAX: u32 = 1 << 20;

/// A received byte.
pub struct Received {
    pub byte: u8,
    /// The chip lost or damaged something at or before this byte.
    pub damaged: bool,
}

/// The port, owned by the boot CPU.
pub struct Serial {
    /// The last status read said that the transmitter is empty, and nothing was sent since.
    tx_empty: bool,
}

impl Serial {
    /// Sets up 115200 8N1 with FIFOs and the receive interrupt.
    pub fn init() -> Self {
        for (register, value) in [
            (INTERRUPT_ENABLE, 0),
            (LINE_CONTROL, LCR_8N1 | LCR_DIVISOR),
            (DATA, 1),
            (INTERRUPT_ENABLE, 0),
            (LINE_CONTROL, LCR_8N1),
            (FIFO_CONTROL, FCR_ENABLE_AND_CLEAR),
            (MODEM_CONTROL, MCR_DTR_RTS_OUT2),
            (INTERRUPT_ENABLE, IER_RECEIVED),
        ] {
            port::write(register, value);
        }
        Self { tx_empty: false }
    }

    /// The next byte from the receiver. None: it is empty, and the next byte will interrupt.
    pub fn receive(&mut self) -> Option<Received> {
        let status = port::read(LINE_STATUS);
        self.tx_empty = status & LSR_THR_EMPTY != 0;
        (status & LSR_DATA_READY != 0).then(|| Received { byte: port::read(DATA), damaged: status & LSR_ERRORS != 0 })
    }

    pub fn send(&mut self, text: &str) {
        for burst in text.as_bytes().chunks(FIFO_BYTES) {
            if !core::mem::take(&mut self.tx_empty) {
                wait_for(LSR_THR_EMPTY);
            }
            burst.iter().for_each(|b| port::write(DATA, *b));
        }
    }
}

fn wait_for(status: u8) {
    for _ in 0..POLLS_MAX {
        if port::read(LINE_STATUS) & status == status {
            return;
        }
        core::hint::spin_loop();
    }
}

/// Sends a last line from any CPU, without owning the port, and waits until it is out.
pub fn panic_write(line: &str) {
    let mut serial = Serial { tx_empty: false };
    serial.send(line);
    serial.send("\n");
    wait_for(LSR_THR_EMPTY | LSR_IDLE);
}
