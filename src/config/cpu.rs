//! `cpu-config`: the differences of the guest's CPU from the one that the host's KVM offers, so that a snapshot can be
//! restored on hosts that offer less (the schema of Firecracker's custom CPU templates for x86).

use std::borrow::Cow;
use std::fmt;

use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A CPU template. Modifiers are applied in order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CpuConfig {
    /// Capabilities that the host's KVM must have in addition to those that tvmm needs.
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes of CPUID.
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes of model-specific registers, on every vCPU.
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A KVM capability by its number: `"121"` is required; `"!56"` is not, unless tvmm itself needs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvmCapability {
    /// The number in `linux/kvm.h`.
    pub number: u32,
    /// True if the host must have it.
    pub is_required: bool,
}

/// Changes of one CPUID leaf.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// EAX.
    #[serde(with = "hex32")]
    pub leaf: u32,
    /// ECX.
    #[serde(with = "hex32")]
    pub subleaf: u32,
    /// KVM's flags of the entry: 1 if the subleaf matters.
    pub flags: u32,
    /// The changes.
    pub modifiers: Vec<RegisterModifier>,
}

/// Changes of one register of a CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// The register.
    pub register: CpuidRegister,
    /// Its bits.
    pub bitmap: Bitmap<32>,
}

/// A register CPUID writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Changes of one model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its number.
    #[serde(with = "hex32")]
    pub addr: u32,
    /// Its bits.
    pub bitmap: Bitmap<64>,
}

/// Bits of a register of `BITS` bits: `"0bx10"` sets bit 1, clears bit 0 and leaves the others. `_` may separate
/// digits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bitmap<const BITS: u32> {
    /// The bits that are set or cleared.
    pub filter: u64,
    /// Their new values.
    pub value: u64,
}

impl<const BITS: u32> Bitmap<BITS> {
    /// Returns `register` with the bits changed.
    pub fn apply(self, register: u64) -> u64 {
        register & !self.filter | self.value
    }

    fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("0b")?.bytes().rev().filter(|digit| *digit != b'_');
        let mut bitmap = Self::default();
        let mut count = 0;
        for digit in digits {
            let bit = 1_u64.checked_shl(count).filter(|_| count < BITS)?;
            count += 1;
            match digit {
                b'x' => continue,
                b'0' => {}
                b'1' => bitmap.value |= bit,
                _ => return None,
            }
            bitmap.filter |= bit;
        }
        (count > 0).then_some(bitmap)
    }
}

impl<const BITS: u32> fmt::Display for Bitmap<BITS> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("0b")?;
        (0..BITS).rev().try_for_each(|bit| {
            let of = |word: u64| word >> bit & 1;
            formatter.write_str(match (of(self.filter), of(self.value)) {
                (0, _) => "x",
                (_, 0) => "0",
                _ => "1",
            })
        })
    }
}

impl<const BITS: u32> Serialize for Bitmap<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const BITS: u32> Deserialize<'de> for Bitmap<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let expected = format!("0b and at most {BITS} digits 0, 1 and x");
        Self::parse(&text).ok_or_else(|| D::Error::invalid_value(Unexpected::Str(&text), &expected.as_str()))
    }
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}{}", if self.is_required { "" } else { "!" }, self.number))
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let (is_required, number) = match text.strip_prefix('!') {
            Some(number) => (false, number),
            None => (true, &*text),
        };
        let expected = "the number of a KVM capability, with `!` before it if it is not needed";
        let number = number.parse().map_err(|_| D::Error::invalid_value(Unexpected::Str(&text), &expected))?;
        Ok(KvmCapability { number, is_required })
    }
}

/// Numbers in Firecracker's form: strings, hexadecimal with `0x`, binary with `0b`, or decimal.
mod hex32 {
    use super::*;

    pub fn serialize<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{number:#x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        let number = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
            (Some(digits), _) => u32::from_str_radix(digits, 16),
            (_, Some(digits)) => u32::from_str_radix(digits, 2),
            _ => text.parse(),
        };
        number.map_err(|_| D::Error::invalid_value(Unexpected::Str(&text), &"a 32-bit number such as \"0x7\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmap_sets_clears_and_leaves_bits() {
        let bitmap = Bitmap::<32>::parse("0b1x_x0x").unwrap();
        assert_eq!(bitmap.apply(0b01110), 0b11100);
        assert_eq!(bitmap.to_string(), "0bxxxxxxxxxxxxxxxxxxxxxxxxxxx1xx0x");
        assert_eq!(Bitmap::<64>::parse(&format!("0b{}", "1".repeat(64))).unwrap().value, u64::MAX);
        for bad in ["", "0b", "1x", "0b2", "0x1", "0b_", &format!("0b{}", "x".repeat(33))] {
            assert_eq!(Bitmap::<32>::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn firecrackers_template_is_read_and_written() {
        let text = r#"{
            "kvm_capabilities": ["!56", "121"],
            "cpuid_modifiers": [{ "leaf": "0x7", "subleaf": "0b0", "flags": 1,
                "modifiers": [{ "register": "ebx", "bitmap": "0b0xxxx" }] }],
            "msr_modifiers": [{ "addr": "0x10a", "bitmap": "0b0" }]
        }"#;
        let config: CpuConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.kvm_capabilities[0], KvmCapability { number: 56, is_required: false });
        assert_eq!((config.cpuid_modifiers[0].leaf, config.msr_modifiers[0].addr), (7, 0x10a));
        let again: CpuConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn templates_that_make_no_sense_are_refused() {
        for (text, said) in [
            (r#"{"reg_modifiers": []}"#, "unknown field"),
            (r#"{"kvm_capabilities": ["x"]}"#, "KVM capability"),
            (r#"{"msr_modifiers": [{"addr": "0xg", "bitmap": "0b0"}]}"#, "32-bit number"),
            (r#"{"msr_modifiers": [{"addr": "0x10a", "bitmap": "0"}]}"#, "at most 64 digits"),
            (
                r#"{"cpuid_modifiers": [{"leaf": "1", "subleaf": "0", "flags": 0,
                "modifiers": [{"register": "eip", "bitmap": "0b0"}]}]}"#,
                "unknown variant",
            ),
        ] {
            let error = serde_json::from_str::<CpuConfig>(text).unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
    }
}
