//! Finds out without the code under test if this host can run a golden snapshot.

use std::arch::x86_64::{__cpuid_count, CpuidResult};
use std::path::Path;

use serde_json::Value;

use crate::support::{answer_to_run, refusal, run};

/// Bits of one CPUID word.
pub struct Feature {
    pub leaf: u32,
    pub subleaf: u32,
    pub register: &'static str,
    pub bits: u32,
}

/// CPUID.1:ECX.OSXSAVE mirrors a control register.
const OSXSAVE: u32 = 1 << 27;

/// The host that a snapshot was taken on, compared with this one.
pub struct Host {
    recorded: Value,
    /// A feature of the CPU that its guest is known to have seen.
    seen: Feature,
}

fn cpuid(leaf: u32, subleaf: u32, register: &str) -> u32 {
    if __cpuid_count(leaf & 0x8000_0000, 0).eax < leaf {
        return 0;
    }
    let CpuidResult { eax, ebx, ecx, edx } = __cpuid_count(leaf, subleaf);
    match register {
        "eax" => eax,
        "ebx" => ebx,
        "ecx" => ecx,
        "edx" => edx,
        other => panic!("{other} is no register of CPUID"),
    }
}

fn vendor() -> String {
    let CpuidResult { ebx, edx, ecx, .. } = __cpuid_count(0, 0);
    String::from_utf8([ebx, edx, ecx].map(u32::to_le_bytes).concat()).unwrap()
}

fn kvm_has(capability: &str) -> bool {
    use kvm_ioctls::Cap;
    let capability = match capability {
        "irqchip" => Cap::Irqchip,
        "pit2" => Cap::Pit2,
        "pit_state2" => Cap::PitState2,
        "xsave" => Cap::Xsave,
        "xcrs" => Cap::Xcrs,
        "debugregs" => Cap::Debugregs,
        "adjust_clock" => Cap::AdjustClock,
        other => panic!("{other} is no capability that a snapshot records"),
    };
    kvm_ioctls::Kvm::new().unwrap().check_extension_int(capability) > 0
}

/// The number behind `0x` at the end of `text`.
fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.rsplit_once("0x").expect(text).1, 16).expect(text)
}

impl Host {
    pub fn of(snapshot: &Path, seen: Feature) -> Host {
        let manifest: Value = serde_json::from_slice(&std::fs::read(snapshot.join("manifest.json")).unwrap()).unwrap();
        Host { recorded: manifest["host"].clone(), seen }
    }

    fn vendor(&self) -> &str {
        self.recorded["cpu_vendor"].as_str().unwrap()
    }

    /// The bits of a CPUID word that the snapshot's host had and this one has not.
    fn lacks(&self, leaf: u32, subleaf: u32, register: &str) -> u32 {
        let is_it = |word: &&Value| word["leaf"] == leaf && word["subleaf"] == subleaf && word["register"] == register;
        let word = self.recorded["features"].as_array().unwrap().iter().find(is_it);
        let recorded = word.expect("the snapshot records the word")["value"].as_u64().unwrap() as u32;
        let volatile = if (leaf, register) == (1, "ecx") { OSXSAVE } else { 0 };
        recorded & !cpuid(leaf, subleaf, register) & !volatile
    }

    fn lacks_xcr0(&self) -> u64 {
        let here = u64::from(cpuid(0xd, 0, "edx")) << 32 | u64::from(cpuid(0xd, 0, "eax"));
        self.recorded["xcr0"].as_u64().unwrap() & !here
    }

    fn lacks_nothing(&self) -> bool {
        let words = self.recorded["features"].as_array().unwrap();
        let capabilities = self.recorded["kvm_capabilities"].as_array().unwrap();
        let number = |word: &Value, key: &str| word[key].as_u64().unwrap() as u32;
        let lacks = |word: &Value| {
            self.lacks(number(word, "leaf"), number(word, "subleaf"), word["register"].as_str().unwrap())
        };
        vendor() == self.vendor()
            && words.iter().all(|word| lacks(word) == 0)
            && self.lacks_xcr0() == 0
            && capabilities.iter().all(|pair| pair[1] == 0 || kvm_has(pair[0].as_str().unwrap()))
    }

    /// Returns true if the guest cannot go on here, because it has seen something that this host lacks.
    pub fn must_refuse(&self) -> bool {
        let Feature { leaf, subleaf, register, bits } = self.seen;
        vendor() != self.vendor() || self.lacks(leaf, subleaf, register) & bits != 0
    }

    /// Checks one reason of a refusal against this host.
    fn check_reason(&self, reason: &str) {
        if let Some(rest) = reason.strip_prefix("CPUID leaf ") {
            let (word, bits) = rest.split_once(" lacks the bits ").expect(reason);
            let (leaf, register) = word.split_once(' ').expect(reason);
            let (leaf, subleaf) = leaf.split_once('.').expect(reason);
            let lacked = self.lacks(hex(leaf) as u32, subleaf.parse().expect(reason), register);
            let bits = hex(bits) as u32;
            assert!(bits != 0 && bits & !lacked == 0, "{reason}: this host lacks {lacked:#x}");
        } else if let Some(bits) = reason.strip_prefix("XCR0 lacks the bits ") {
            let bits = hex(bits);
            assert!(bits != 0 && bits & !self.lacks_xcr0() == 0, "{reason}: this host lacks {:#x}", self.lacks_xcr0());
        } else if let Some(capability) = reason.strip_prefix("KVM lacks the capability ") {
            assert!(!kvm_has(capability), "{reason}");
        } else {
            assert_ne!(vendor(), self.vendor(), "{reason}");
            assert_eq!(reason, format!("the CPU is {}, the snapshot was taken on {}", vendor(), self.vendor()));
        }
    }

    /// Restores with `args` and runs the guest's `check`, which must answer `digest`. On a host that lacks what the
    /// guest has seen, the restore must be refused for exactly that.
    pub fn restores_or_refuses(&self, args: &[&str], digest: &str) {
        let output = run(&[&["restore"], args, &["--run", "check"]].concat());
        if output.status.success() {
            assert!(!self.must_refuse(), "{args:?}: this host cannot run it");
            let stdout = String::from_utf8_lossy(&output.stdout);
            return assert_eq!(answer_to_run(&stdout).digest, digest, "{args:?}: {stdout}");
        }
        let said = refusal(&output);
        assert!(!self.lacks_nothing(), "{args:?}: this host has all that the snapshot's had: {said}");
        let reasons = said.trim().strip_prefix("tvmm: This host cannot run the snapshot: ").expect(&said);
        reasons.split("; ").for_each(|reason| self.check_reason(reason));
        let Feature { leaf, subleaf, register, bits } = self.seen;
        let seen = format!("CPUID leaf {leaf:#x}.{subleaf} {register} lacks the bits ");
        let named =
            reasons.split("; ").find_map(|reason| reason.strip_prefix(&seen)).map_or(0, |bits| hex(bits) as u32);
        assert_eq!(named & bits, self.lacks(leaf, subleaf, register) & bits, "{said}");
    }
}
