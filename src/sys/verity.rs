//! fs-verity: files whose pages the kernel checks against a digest as it reads them (Linux `filesystems/fsverity.rst`).

use std::fs::File;

use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

/// The longest digest that the kernel has: SHA-512.
const DIGEST_MAX: usize = 64;

/// `struct fsverity_digest` of Linux `include/uapi/linux/fsverity.h`, with room for the digest.
#[repr(C)]
struct Measured {
    algorithm: u16,
    len: u16,
    digest: [u8; DIGEST_MAX],
}

const VERITY: u32 = 'f' as u32;
// The number counts the two fields before the digest.
ioctl_iowr_nr!(FS_IOC_MEASURE_VERITY, VERITY, 134, [u16; 2]);

/// The digest of a file with fs-verity, as `algorithm:hexadecimal`; `None` for a file without, or where the kernel
/// cannot say.
pub fn digest_of(file: &File) -> Option<String> {
    let mut measured = Measured { algorithm: 0, len: DIGEST_MAX as u16, digest: [0; DIGEST_MAX] };
    // SAFETY: the kernel reads the length and writes at most that many bytes of digest; the structure outlives the
    // call.
    if unsafe { ioctl_with_mut_ref(file, FS_IOC_MEASURE_VERITY(), &mut measured) } != 0 {
        return None;
    }
    let algorithm = match measured.algorithm {
        1 => "sha256".to_string(),
        2 => "sha512".to_string(),
        other => format!("algorithm {other}"),
    };
    let digest = &measured.digest[..usize::from(measured.len).min(DIGEST_MAX)];
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("{algorithm}:{digest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_file_has_no_digest() {
        assert_eq!(FS_IOC_MEASURE_VERITY(), 0xc004_6686);
        assert_eq!(digest_of(&tempfile::tempfile().unwrap()), None);
    }
}
