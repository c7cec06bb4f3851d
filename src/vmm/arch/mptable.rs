//! The MP table (Intel MultiProcessor Specification 1.4), in which kernels without ACPI find processors and interrupts.

use super::layout;

const REVISION_1_4: u8 = 4;
const FLOATING_LEN: usize = 16;
const HEADER_LEN: usize = 44;
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
const FEATURE_FPU_APIC: u32 = 0x201;
const ISA_BUS: u8 = 0;
/// Interrupt types.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
const ALL_LAPICS: u8 = 0xff;

/// Floating pointer and configuration table as one block for [`layout::MP_TABLE`].
pub fn table(vcpu_count: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut add = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for index in 0..vcpu_count {
        let boot = if index == 0 { CPU_BOOT } else { 0 };
        let mut processor = [0; 20];
        processor[1..4].copy_from_slice(&[index, LAPIC_VERSION, CPU_ENABLED | boot]);
        // Family 6 with FPU and APIC; kernels ask CPUID for the details.
        processor[4..8].copy_from_slice(&0x600_u32.to_le_bytes());
        processor[8..12].copy_from_slice(&FEATURE_FPU_APIC.to_le_bytes());
        add(&processor);
    }
    add(b"\x01\x00ISA   ");
    // APIC ids are one space: the IOAPIC's follows the processors'.
    let ioapic = vcpu_count;
    let [a, b, c, d] = (layout::IOAPIC as u32).to_le_bytes();
    add(&[2, ioapic, IOAPIC_VERSION, 1, a, b, c, d]);
    // Input n is ISA interrupt n, for devices beyond ISA's sixteen too; polarity and trigger as on the bus.
    for gsi in 0..layout::GSI_COUNT as u8 {
        add(&[3, INT, 0, 0, ISA_BUS, gsi, ioapic, gsi]);
    }
    add(&[4, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[4, NMI, 0, 0, ISA_BUS, 0, ALL_LAPICS, 1]);
    let header = header(entries.len(), count, &entries);
    [&floating()[..], &header, &entries].concat()
}

fn floating() -> [u8; FLOATING_LEN] {
    let mut floating = [0; FLOATING_LEN];
    floating[..4].copy_from_slice(b"_MP_");
    floating[4..8].copy_from_slice(&(layout::MP_TABLE as u32 + FLOATING_LEN as u32).to_le_bytes());
    floating[8] = 1; // Its length in paragraphs.
    floating[9] = REVISION_1_4;
    floating[10] = checksum(&floating);
    floating
}

fn header(entries_len: usize, count: u16, entries: &[u8]) -> [u8; HEADER_LEN] {
    let mut header = [0; HEADER_LEN];
    header[..4].copy_from_slice(b"PCMP");
    header[4..6].copy_from_slice(&((HEADER_LEN + entries_len) as u16).to_le_bytes());
    header[6] = REVISION_1_4;
    header[8..16].copy_from_slice(b"TVMM    ");
    header[16..28].copy_from_slice(b"microVM     ");
    header[34..36].copy_from_slice(&count.to_le_bytes());
    header[36..40].copy_from_slice(&(layout::LAPIC as u32).to_le_bytes());
    header[7] = checksum(&[&header[..], entries].concat());
    header
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_table_fits_its_place_and_its_checksums_are_right() {
        let table = table(32);
        assert!(table.len() <= 1024);
        assert_eq!(checksum(&table[..FLOATING_LEN]), 0);
        let configuration = &table[FLOATING_LEN..];
        assert_eq!(usize::from(u16::from_le_bytes([configuration[4], configuration[5]])), configuration.len());
        assert_eq!(checksum(configuration), 0);
        assert_eq!(u16::from_le_bytes([configuration[34], configuration[35]]), 32 + 1 + 1 + 24 + 2);
    }
}
