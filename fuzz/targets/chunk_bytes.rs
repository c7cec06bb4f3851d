#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tvmm::fuzzing::chunk_bytes(data));
