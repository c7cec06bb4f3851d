//! `compression`: a zip archive with one member (PKWARE APPNOTE 6.3, RFC 1951), as FaaSnap's `compression` makes of the
//! input of `json`.

use alloc::vec::Vec;

/// The level that Python's zlib takes for "default".
const LEVEL: u8 = 6;
const DEFLATED: u16 = 8;
const VERSION: u16 = 20;
/// 1 January 1980: the archive depends on nothing but its member.
const DATE: u16 = 0x21;
const LOCAL: u32 = 0x0403_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const END: u32 = 0x0605_4b50;

/// CRC-32 of ISO 3309 (polynomial 0xedb88320).
pub fn crc32(bytes: &[u8]) -> u32 {
    let table: [u32; 256] = core::array::from_fn(|i| {
        (0..8).fold(i as u32, |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    });
    !bytes.iter().fold(!0, |crc, byte| crc >> 8 ^ table[usize::from(crc as u8 ^ byte)])
}

/// An archive that holds `data` as `name`. Both must be shorter than 2^32 and 2^16 bytes.
pub fn archive(name: &str, data: &[u8]) -> Vec<u8> {
    let packed = miniz_oxide::deflate::compress_to_vec(data, LEVEL);
    let mut member = Vec::new();
    for half in [VERSION, 0, DEFLATED, 0, DATE] {
        member.extend(half.to_le_bytes());
    }
    for word in [crc32(data), packed.len() as u32, data.len() as u32] {
        member.extend(word.to_le_bytes());
    }
    member.extend((name.len() as u16).to_le_bytes());
    member.extend(0_u16.to_le_bytes());
    let mut out = Vec::with_capacity(packed.len() + 256);
    out.extend(LOCAL.to_le_bytes());
    out.extend(&member);
    out.extend(name.as_bytes());
    out.extend(&packed);
    let directory = out.len() as u32;
    out.extend(CENTRAL.to_le_bytes());
    out.extend(VERSION.to_le_bytes());
    out.extend(&member);
    // No comment, the first disk, no attributes, the member at offset 0.
    out.extend([0; 14]);
    out.extend(name.as_bytes());
    let directory_len = out.len() as u32 - directory;
    out.extend(END.to_le_bytes());
    for half in [0_u16, 0, 1, 1] {
        out.extend(half.to_le_bytes());
    }
    out.extend(directory_len.to_le_bytes());
    out.extend(directory.to_le_bytes());
    out.extend(0_u16.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workloads::json::document;

    #[test]
    fn crc_of_the_check_string_is_the_published_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn archive_inflates_to_its_input() {
        let data = document(50_000, 1);
        let zip = archive("json", &data);
        assert!(zip.len() * 3 < data.len(), "{}", zip.len());
        let packed = u32::from_le_bytes(zip[18..22].try_into().unwrap()) as usize;
        let start = 30 + 4;
        assert_eq!(miniz_oxide::inflate::decompress_to_vec(&zip[start..start + packed]).unwrap(), data);
        assert_eq!(zip[start + packed..][..4], CENTRAL.to_le_bytes());
    }

    /// An independent reader, where there is one.
    #[test]
    fn archive_is_read_by_python() {
        let path = std::env::temp_dir().join(format!("tvmm-guest-{}.zip", std::process::id()));
        let data = document(3000, 2);
        std::fs::write(&path, archive("json", &data)).unwrap();
        let read = "import sys, zipfile; sys.stdout.write(zipfile.ZipFile(sys.argv[1]).read('json').decode())";
        let python = std::process::Command::new("python3").args(["-c", read]).arg(&path).output();
        std::fs::remove_file(&path).unwrap();
        match python {
            Ok(python) => assert_eq!(python.stdout, data, "{}", String::from_utf8_lossy(&python.stderr)),
            Err(_) => println!("skipped: no python3 here"),
        }
    }
}
