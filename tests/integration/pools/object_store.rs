//! Cold pools in object stores: a build with the feature `object-store`, against a real S3-compatible server
//! (`moto_server` of the Python package moto[server]) where there is one.

#[cfg(not(feature = "object-store"))]
mod without {
    use crate::support::cold::Scene;
    use crate::support::{run_err, text};

    #[test]
    fn build_without_object_stores_says_so() {
        let scene = Scene::make();
        for args in [
            vec!["restore", "--snapshot", text(&scene.bare), "--run", "hello", "--cold", "s3://bucket/pool"],
            vec!["pool", "ls", "s3://bucket/pool"],
            vec!["pool", "create", "--tier", "remote", "--at", "gs://bucket/pool"],
        ] {
            let said = run_err(&args);
            assert!(said.contains("--features object-store"), "{said}");
        }
    }
}

#[cfg(feature = "object-store")]
mod with {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use crate::skip::skip;
    use crate::support::cold::Scene;
    use crate::support::{TIMEOUT, finish, text, tvmm};

    const BUCKET: &str = "pools";

    /// A running S3 server with a bucket.
    struct S3 {
        child: Child,
        endpoint: String,
    }

    impl S3 {
        /// `None`, with the reason printed, where none is installed.
        fn start() -> Option<S3> {
            let program = std::env::var("TVMM_TEST_MOTO").unwrap_or_else(|_| "moto_server".to_string());
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let mut command = Command::new(&program);
            command.args(["-H", "127.0.0.1", "-p", &port.to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
            let child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    skip!("object-store", "{program} (Python package moto[server]) cannot be started: {error}");
                    return None;
                }
            };
            let server = S3 { child, endpoint: format!("http://127.0.0.1:{port}") };
            let deadline = Instant::now() + TIMEOUT;
            while TcpStream::connect(("127.0.0.1", port)).is_err() {
                assert!(Instant::now() < deadline, "{program} does not listen");
                std::thread::sleep(Duration::from_millis(50));
            }
            server.make_bucket(port);
            Some(server)
        }

        fn make_bucket(&self, port: u16) {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let request = format!(
                "PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: 0\r\n\
                 Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, \
                 SignedHeaders=host, Signature=0\r\n\r\n"
            );
            stream.write_all(request.as_bytes()).unwrap();
            let mut answer = String::new();
            let _ = stream.read_to_string(&mut answer);
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }

        fn tvmm(&self, args: &[&str]) -> (Option<i32>, String, String) {
            tvmm_with(&self.endpoint, args)
        }

        fn ok(&self, args: &[&str]) -> String {
            let (code, stdout, stderr) = self.tvmm(args);
            assert_eq!(code, Some(0), "{args:?}: {stderr}");
            stdout
        }

        fn refused(&self, args: &[&str]) -> String {
            let (code, _, stderr) = self.tvmm(args);
            assert_eq!(code, Some(1), "{args:?}: {stderr}");
            stderr
        }
    }

    /// Runs `tvmm` with a server in its environment: exit code, standard output, standard error.
    fn tvmm_with(endpoint: &str, args: &[&str]) -> (Option<i32>, String, String) {
        let mut command = tvmm();
        command.args(args).env("AWS_ENDPOINT", endpoint).env("AWS_ALLOW_HTTP", "true");
        command.env("AWS_ACCESS_KEY_ID", "test").env("AWS_SECRET_ACCESS_KEY", "test").env("AWS_REGION", "us-east-1");
        let output = finish(&mut command);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    /// Answers of a store that completes no object.
    #[derive(Clone, Copy, Debug)]
    enum Fault {
        Silence,
        Drip,
        Cut,
        Garbage,
    }

    impl Fault {
        /// Meets every connection from now on; returns the endpoint.
        fn serve(self) -> String {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let endpoint = format!("http://{}", listener.local_addr().unwrap());
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    std::thread::spawn(move || self.meet(stream));
                }
            });
            endpoint
        }

        fn meet(self, mut stream: TcpStream) {
            const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\nETag: \"a\"\r\n\
                Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n";
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            match self {
                // Until the client gives up.
                Fault::Silence => while stream.read(&mut request).is_ok_and(|count| count > 0) {},
                Fault::Drip => {
                    let _ = stream.write_all(HEAD);
                    while stream.write_all(&[7]).is_ok() {
                        std::thread::sleep(Duration::from_millis(30));
                    }
                }
                Fault::Cut => drop(stream.write_all(&[HEAD, &[7; 1000]].concat())),
                Fault::Garbage => drop(stream.write_all(&[0xf7; 5000])),
            }
        }
    }

    #[test]
    fn store_that_completes_no_object_ends_the_restore_in_time() {
        // Far above the fault time-out, and far below the 3,000 s that all of the object would drip for.
        const BOUND: Duration = Duration::from_secs(120);
        let scene = Scene::make();
        let pool = format!("s3://{BUCKET}/far/pool");
        for fault in [Fault::Silence, Fault::Drip, Fault::Cut, Fault::Garbage] {
            let args = ["restore", "--snapshot", text(&scene.bare), "--run", "check", "--cold", &pool];
            let began = Instant::now();
            let endpoint = fault.serve();
            let (code, _, said) = tvmm_with(&endpoint, &[&args[..], &["--fault-timeout", "1"]].concat());
            assert_eq!(code, Some(1), "{fault:?}: {said}");
            assert!(said.contains(&pool) && !said.contains("panicked"), "{fault:?}: {said}");
            assert!(began.elapsed() < BOUND, "{fault:?}: it took {:?}", began.elapsed());
        }
    }

    impl Drop for S3 {
        fn drop(&mut self) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    #[test]
    fn guest_runs_from_a_bucket_and_from_what_is_cached_of_it() {
        let Some(s3) = S3::start() else { return };
        let scene = Scene::make();
        let pool = format!("s3://{BUCKET}/far/pool");
        let restore = |policy: &'static str, more: &[&str]| {
            let args =
                ["restore", "--snapshot", text(&scene.bare), "--policy", policy, "--run", "check", "--cold", &pool];
            s3.ok(&[&args[..], more].concat())
        };
        s3.ok(&["pool", "create", "--tier", "remote", "--at", &pool, "--chunk", "256"]);
        assert!(
            s3.refused(&["pool", "create", "--tier", "remote", "--at", &pool]).contains("there is a cold pool already")
        );
        s3.ok(&["pool", "add", &pool, text(&scene.snapshot)]);
        assert!(s3.refused(&["pool", "add", &pool, text(&scene.snapshot)]).contains("already holds snapshot"));
        assert!(s3.ok(&["pool", "show", &pool]).contains("chunks of 256 KiB"));
        s3.ok(&["pool", "fsck", &pool]);
        s3.ok(&["pool", "gc", &pool]);
        assert!(restore("eager", &[]).contains(&scene.digest));
        let cache = scene.dir.path().join("cache");
        let out = scene.dir.path().join("r.json");
        let more = ["--cold-cache", text(&cache), "--report", text(&out)];
        for cached in [false, true] {
            assert!(restore("firecracker-uffd", &more).contains(&scene.digest));
            let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
            let place = &report["cold"]["places"][0];
            assert_eq!(place["cached"] == place["chunks"], cached, "{place}");
        }
        let id = s3.ok(&["pool", "ls", &pool]);
        s3.ok(&["pool", "rm", &pool, id.trim()]);
        let args =
            ["restore", "--snapshot", text(&scene.bare), "--run", "hello", "--fault-timeout", "4", "--cold", &pool];
        assert!(s3.refused(&args).contains("the object is missing"));
        let nowhere = s3.refused(&["pool", "ls", "s3://nowhere/pool"]);
        assert!(nowhere.contains("s3://nowhere/pool"), "{nowhere}");
    }

    #[test]
    fn store_that_is_gone_ends_the_restore_in_time() {
        let Some(mut s3) = S3::start() else { return };
        let scene = Scene::make();
        let _ = s3.child.kill();
        let asked = Instant::now();
        let pool = format!("s3://{BUCKET}/pool");
        let args =
            ["restore", "--snapshot", text(&scene.bare), "--run", "hello", "--fault-timeout", "3", "--cold", &pool];
        let said = s3.refused(&args);
        assert!(said.contains(&pool), "{said}");
        assert!(asked.elapsed() < Duration::from_secs(60));
    }
}
