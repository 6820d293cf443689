;; The hold filter: keeps the headers of an answer back until the first byte of its body.
;;
;; A llama-server sends its headers before it reads the prompt. Envoy repeats a request only while
;; no headers came, so a server that dies over the prompt would leave its clients with an empty
;; stream. Held back next to the upstream, the headers have not come yet, and Envoy repeats.
;;
;; Proxy-Wasm ABI 0.2.1: the host calls these exports; nothing is imported and nothing is kept.
;; hold.wasm is assembled from this file (wasmtime.wat2wasm); a test compares the two.
(module
  ;; The host wants a memory and a way to get some of it, though it never has to.
  (memory (export "memory") 1)
  (func (export "malloc") (param i32) (result i32)
    (i32.const 0))

  (func (export "proxy_abi_version_0_2_1"))
  (func (export "_initialize"))

  ;; (context, its parent)
  (func (export "proxy_on_context_create") (param i32 i32))

  ;; (context, size) -> yes, it works
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32)
    (i32.const 1))
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (i32.const 1))

  ;; (context, headers, whether nothing follows) -> 0 to continue, 1 to stop here for now
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
    (i32.eqz (local.get 2)))

  ;; (context, bytes, whether nothing follows) -> 0 to continue, which lets the headers go, too
  (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
    (i32.const 0)))
