//! The `tvmm` binary. Everything is in the library.

fn main() -> std::process::ExitCode {
    tvmm::cli::main()
}
