//! What each call takes: the one table of it. A call without a row here is refused, and fails a test.

/// What somebody must be to make a call at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nobody is asked: a load balancer has no password.
    Nothing,
    /// Any user; what the statements in it may touch is decided when they run.
    User,
    /// A user who has just proved it, and not by a token.
    Proof,
    /// A user with the role backup, or an administrator.
    Backup,
    /// An administrator.
    Admin,
}

/// Every call that sqlited serves.
const CALLS: &[(&str, Needs)] = &[
    ("/resqlite.v1.ReSqlite/Execute", Needs::User),
    ("/resqlite.v1.ReSqlite/Query", Needs::User),
    ("/resqlite.v1.ReSqlite/Run", Needs::User),
    ("/resqlite.v1.ReSqlite/Begin", Needs::User),
    ("/resqlite.v1.ReSqlite/Rollback", Needs::User),
    ("/resqlite.v1.ReSqlite/Status", Needs::User),
    ("/resqlite.v1.ReSqlite/Login", Needs::Proof),
    // An administrator; but everybody may change their own password.
    ("/resqlite.v1.ReSqlite/ChangeUsers", Needs::User),
    ("/resqlite.v1.ReSqlite/ListUsers", Needs::Admin),
    ("/resqlite.v1.ReSqlite/Verify", Needs::Admin),
    ("/resqlite.v1.ReSqlite/ContentHash", Needs::Admin),
    ("/resqlite.v1.ReSqlite/MoveLeader", Needs::Admin),
    ("/resqlite.v1.ReSqlite/Backup", Needs::Backup),
    ("/resqlite.v1.ReSqlite/Restore", Needs::Admin),
    ("/grpc.health.v1.Health/Check", Needs::Nothing),
    ("/grpc.health.v1.Health/Watch", Needs::Nothing),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Needs::User),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", Needs::User),
];

/// What the call with this path takes; `None`: there is no such call.
pub fn needs(path: &str) -> Option<Needs> {
    CALLS.iter().find(|(call, _)| *call == path).map(|(_, needs)| *needs)
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use resqlite::api;

    use super::*;

    /// `google.protobuf.FileDescriptorSet`, as far as it is needed here.
    #[derive(Clone, PartialEq, Message)]
    struct Files {
        #[prost(message, repeated, tag = "1")]
        files: Vec<File>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct File {
        #[prost(string, tag = "2")]
        package: String,
        #[prost(message, repeated, tag = "6")]
        services: Vec<Service>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Service {
        #[prost(string, tag = "1")]
        name: String,
        #[prost(message, repeated, tag = "2")]
        methods: Vec<Method>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Method {
        #[prost(string, tag = "1")]
        name: String,
    }

    fn calls(descriptors: &[u8], served: &[&str]) -> Vec<String> {
        let mut calls = Vec::new();
        for file in Files::decode(descriptors).unwrap().files {
            for service in file.services {
                let service_name = format!("{}.{}", file.package, service.name);
                if served.contains(&service_name.as_str()) {
                    let path = |method: Method| format!("/{service_name}/{}", method.name);
                    calls.extend(service.methods.into_iter().map(path));
                }
            }
        }
        calls
    }

    #[test]
    fn every_call_that_is_served_has_its_row_and_no_row_is_without_a_call() {
        let mut served = calls(api::DESCRIPTORS, &["resqlite.v1.ReSqlite"]);
        let health = tonic_health::pb::FILE_DESCRIPTOR_SET;
        served.extend(calls(health, &["grpc.health.v1.Health"]));
        let v1 = "grpc.reflection.v1.ServerReflection";
        served.extend(calls(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET, &[v1]));
        let alpha = "grpc.reflection.v1alpha.ServerReflection";
        served.extend(calls(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET, &[alpha]));
        assert!(served.iter().any(|call| call.ends_with("/ChangeUsers")), "{served:?}");
        for call in &served {
            assert!(needs(call).is_some(), "{call} has no row");
        }
        for (call, _) in CALLS {
            assert!(served.iter().any(|served| served == call), "{call} is not served");
        }
        assert_eq!(needs("/resqlite.v1.ReSqlite/Nothing"), None);
    }
}
