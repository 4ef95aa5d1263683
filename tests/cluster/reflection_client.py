"""Lists, describes, executes and queries with nothing but gRPC server reflection."""

import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

channel = grpc.insecure_channel(sys.argv[1])
database = ProtoReflectionDescriptorDatabase(channel)
services = set(database.get_services())
assert {"resqlite.v1.ReSqlite", "grpc.health.v1.Health"} <= services, services

service = DescriptorPool(database).FindServiceByName("resqlite.v1.ReSqlite")


def call(method_name, json):
    """Calls a method with a request in its JSON form; a list for a stream."""
    method = service.methods_by_name[method_name]
    request = ParseDict(json, GetMessageClass(method.input_type)())
    response_class = GetMessageClass(method.output_type)
    path = f"/{service.full_name}/{method_name}"
    as_dict = lambda message: MessageToDict(message, preserving_proto_field_name=True)
    if method.server_streaming:
        stub = channel.unary_stream(path, type(request).SerializeToString, response_class.FromString)
        return [as_dict(message) for message in stub(request, timeout=20)]
    stub = channel.unary_unary(path, type(request).SerializeToString, response_class.FromString)
    return as_dict(stub(request, timeout=20))


insert = {"sql": "insert into t(name, raw) values(?, ?)", "params": [{"text": "Zoë"}, {"blob": "AAH/"}]}
named = {"sql": "insert into t(name) values(:name)", "named_params": {"name": {"text": "named"}}}
reply = call("Execute", {"statements": [insert, named]})
assert [result["rows_affected"] for result in reply["results"]] == ["1", "1"], reply
assert int(reply["log_index"]) > 0, reply

messages = call("Query", {"sql": "select id, name, raw from t where id <= ? order by id", "params": [{"integer": 9}]})
assert [column["name"] for column in messages[0]["columns"]] == ["id", "name", "raw"], messages
assert [column["declared_type"] for column in messages[0]["columns"]] == ["INTEGER", "TEXT", "BLOB"], messages
rows = [row["values"] for message in messages for row in message.get("rows", [])]
assert rows[0] == [{"integer": "1"}, {"text": "Zoë"}, {"blob": "AAH/"}], rows
assert rows[1][1] == {"text": "named"}, rows

try:
    call("Query", {"sql": "select * from missing"})
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    assert "no such table: missing" in error.details(), error
else:
    raise AssertionError("a query of a missing table succeeded")
print("ok")
