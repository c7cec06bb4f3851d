//! COM1: a 16550A UART (vm-superio) with its input bounded by the FIFO and its output by [`ConsoleOutput`].

use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{BusDevice, Error, InterruptLine};
use crate::sys::output::ConsoleOutput;

/// The UART's registers and the bytes in its receive FIFO.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    pub divisor: [u8; 2],
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub received: Vec<u8>,
}

/// Shared between the UART model and the line it triggers.
struct SharedLine(Arc<InterruptLine>);

impl vm_superio::Trigger for SharedLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        vm_superio::Trigger::trigger(&*self.0)
    }
}

/// Tells the main loop that the guest has emptied the FIFO.
struct FifoEvents(Arc<EventFd>);

impl SerialEvents for FifoEvents {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A full counter already tells the main loop.
        let _ = self.0.write(1);
    }
}

/// Gathers the bytes of one access, which the UART model hands over and flushes one by one.
struct Out {
    output: Arc<ConsoleOutput>,
    gathered: Vec<u8>,
}

impl Out {
    fn new(output: &Arc<ConsoleOutput>) -> Self {
        Out { output: output.clone(), gathered: Vec::new() }
    }

    fn send(&mut self) {
        if !self.gathered.is_empty() {
            self.output.put(&self.gathered);
            self.gathered.clear();
        }
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.gathered.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Uart = vm_superio::Serial<SharedLine, FifoEvents, Out>;

/// The serial port.
pub struct Serial {
    uart: Mutex<Uart>,
    line: Arc<InterruptLine>,
    fifo_empty: Arc<EventFd>,
    output: Arc<ConsoleOutput>,
}

impl Serial {
    pub fn new(output: Arc<ConsoleOutput>) -> Result<Self, Error> {
        let event = |doing| move |source| Error::Event { doing, device: "serial port", source };
        let line = Arc::new(InterruptLine::default());
        let fifo_empty = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(event("make an eventfd"))?);
        let uart = Uart::with_events(SharedLine(line.clone()), FifoEvents(fifo_empty.clone()), Out::new(&output));
        Ok(Serial { uart: Mutex::new(uart), line, fifo_empty, output })
    }

    /// The line to connect to IRQ 4.
    pub fn interrupt_line(&self) -> &InterruptLine {
        &self.line
    }

    /// Readable when the guest has taken the last received byte.
    pub fn fifo_empty_event(&self) -> &EventFd {
        &self.fifo_empty
    }

    pub fn output(&self) -> &Arc<ConsoleOutput> {
        &self.output
    }

    /// The number of bytes that [`receive`](Self::receive) would take now.
    pub fn room(&self) -> usize {
        self.lock().fifo_capacity()
    }

    /// Puts bytes into the receive FIFO, as if they came over the line. Returns the number that fitted.
    pub fn receive(&self, bytes: &[u8]) -> Result<usize, Error> {
        match self.lock().enqueue_raw_bytes(bytes) {
            Ok(count) => Ok(count),
            Err(vm_superio::serial::Error::FullFifo) => Ok(0),
            Err(vm_superio::serial::Error::Trigger(source) | vm_superio::serial::Error::IOError(source)) => {
                Err(Error::Event { doing: "raise the interrupt", device: "serial port", source })
            }
        }
    }

    pub fn save(&self) -> SerialState {
        let state = self.lock().state();
        SerialState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// Takes over a saved state. An interrupt that was pending is raised again: a snapshot by an older tvmm may
    /// have the controller before the edge reached it, and a spurious edge does no harm.
    pub fn restore(&self, state: &SerialState) -> Result<(), Error> {
        let state = vm_superio::SerialState {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        };
        let events = FifoEvents(self.fifo_empty.clone());
        let uart = Uart::from_state(&state, SharedLine(self.line.clone()), events, Out::new(&self.output))
            .map_err(|_| Error::State { device: "serial port", what: "more bytes received than the FIFO holds" })?;
        *self.lock() = uart;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // Wider accesses and `rep ins` come as several bytes; each is one read of the register.
        let mut uart = self.lock();
        data.iter_mut().for_each(|byte| *byte = uart.read(offset as u8));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut uart = self.lock();
        for &byte in data {
            // KVM refuses an edge only if it has no such input; the machine was not built then.
            let _ = uart.write(offset as u8, byte);
        }
        uart.writer_mut().send();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sys::output::FdSink;

    fn serial() -> (Serial, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let output = ConsoleOutput::new(Box::new(FdSink::new(writer.into()))).unwrap();
        (Serial::new(Arc::new(output)).unwrap(), reader)
    }

    #[test]
    fn state_with_unread_input_survives_a_round_trip_and_raises_its_interrupt_again() {
        let (first, _reader) = serial();
        first.write(1, &[0x01]);
        assert_eq!(first.receive(b"hello").unwrap(), 5);
        let state = first.save();
        let (second, _reader) = serial();
        second.restore(&state).unwrap();
        assert_eq!(second.save(), state);
        assert!(second.interrupt_line().take_unconnected() > 0);
        let mut data = [0; 5];
        second.read(0, &mut data);
        assert_eq!(&data, b"hello");
        assert!(second.fifo_empty_event().read().is_ok());
    }

    #[test]
    fn input_beyond_the_fifo_is_refused_not_lost() {
        let (serial, _reader) = serial();
        let taken = serial.receive(&[7; 100]).unwrap();
        assert_eq!(taken, 64);
        assert_eq!(serial.receive(&[7]).unwrap(), 0);
        assert_eq!(serial.room(), 0);
    }

    #[test]
    fn impossible_saved_state_is_refused() {
        let (serial, _reader) = serial();
        let state = SerialState { received: vec![0; 65], ..SerialState::default() };
        assert!(matches!(serial.restore(&state), Err(Error::State { .. })));
    }

    proptest! {
        #[test]
        fn no_driver_makes_the_serial_port_panic_or_its_state_unusable(
            acts in proptest::collection::vec((0u8..4, 0u64..10, proptest::collection::vec(any::<u8>(), 0..20)),
            1..100),
        ) {
            let (serial, _reader) = serial();
            for (act, offset, mut bytes) in acts {
                match act {
                    0 => serial.read(offset, &mut bytes),
                    1 | 2 => serial.write(offset, &bytes),
                    _ => prop_assert!(serial.receive(&bytes).unwrap() <= bytes.len()),
                }
                let state = serial.save();
                serial.restore(&state).unwrap();
                prop_assert_eq!(serial.save(), state);
            }
        }
    }
}
