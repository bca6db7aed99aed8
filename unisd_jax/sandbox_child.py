"""What runs inside the process of `sandbox`: gives up its rights, runs the program and reports how it ended.

It is compiled by `sandbox` and handed to a bare interpreter, so it imports nothing of the package, and little of the
standard library: an import here is paid for by every program. The numbers are those of the Linux kernel's interface.
"""

import _signal  # `signal` would import `enum`, which takes as long as all the rest
import _sitebuiltins
import builtins
import ctypes
import os
import resource
import struct
import sys

STARTED = b"\1"

NEW_USER, NEW_NETWORK, NEW_PROCESSES = 0x10000000, 0x40000000, 0x20000000
PARENT_DEATH_SIGNAL, SET_SECCOMP, NO_NEW_PRIVILEGES = 1, 22, 38

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
WRITE_FILE, READ_FILE, READ_FOLDER = 1 << 1, 1 << 2, 1 << 3
EXECUTE, MAKE_DEVICES, DEVICE_CONTROL = 1 << 0, 1 << 6 | 1 << 11, 1 << 15
ACCESS_BITS = (13, 14, 15, 15, 16)  # how many rights each version of Landlock knows; the last goes for later ones too

ALL = 0xFFFFFFFF
ALLOW, REFUSE, IGNORE, KILL = 0x7FFF0000, 0x00050001, 0x00050000, 0x80000000
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables below, the kernel's name

# fmt: off
# System calls, by their numbers on x86_64 and on aarch64.
REFUSED = {
    # Processes and threads. A program has no need of another one.
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
    "personality": (135, 92),
    # The network.
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242),
    # Files that Landlock does not see: by handle, on devices, in memory that outlives or is not counted.
    "truncate": (76, 45), "mknod": (133, None), "mknodat": (259, 33), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466), "file_setattr": (469, 469),
    # The machine.
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "open_tree_attr": (467, 467), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "userfaultfd": (323, 282), "fanotify_init": (300, 262),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116),
    "vhangup": (153, 58), "iopl": (172, None), "ioperm": (173, None),
}
# These do as if: they would reach files outside, which Landlock does not prevent, and `shutil.copy` calls them.
IGNORED = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88),
}
# The answer depends on an argument: its position, its bits, values, and the answers to these and to others. Signals
# (None: the process's own number) and limits are for itself; of sockets there is only the connected pair, with which
# asyncio begins; and no descriptor may send signals to others, nor may the program survive its parent.
CONDITIONAL = {
    "kill": ((62, 129), 0, ALL, None, (ALLOW, REFUSE)),
    "tgkill": ((234, 131), 0, ALL, None, (ALLOW, REFUSE)),
    "prlimit64": ((302, 261), 0, ALL, (0,), (ALLOW, REFUSE)),
    "socketpair": ((53, 199), 1, 0xF, (1,), (ALLOW, REFUSE)),
    "fcntl": ((72, 25), 1, ALL, (8, 15), (REFUSE, ALLOW)),
    "ioctl": ((16, 29), 1, ALL, (0x8901, 0x8902), (REFUSE, ALLOW)),
    "prctl": ((157, 167), 0, ALL, (1,), (REFUSE, ALLOW)),
}
# fmt: on


def main(job):
    """Does the job, see `sandbox._run`; the secret follows it on the standard input."""
    write, leave, report, program = os.write, os._exit, job["report"], job["program"]
    sys.path += job["libraries"]
    builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "Ctrl-D")  # what `site` does, the rest takes longer
    contain(job)
    write(report, STARTED)
    # The secret is meanwhile only among this frame's operands, where neither frames nor the garbage collector show it.
    # What runs after the program must not trust a name that it could have changed.
    write(report, sys.stdin.buffer.read(job["secret"]) + attempt(program) + b"\0")
    leave(0)


def attempt(program):
    """Runs the program as a module; how it ended, and on what line and why unless it passed."""
    try:
        code = compile(program, "program.py", "exec", dont_inherit=True)
    except Exception as error:
        return b" ".join([b"syntax_error", describe(error)])
    module = type(sys)("program")
    module.__builtins__ = builtins  # this code has a copy of its own, which the program does not change
    sys.modules["program"] = sys.modules["__main__"] = module
    try:
        exec(code, module.__dict__)
    except AssertionError as error:
        return b" ".join([b"wrong_answer", describe(error)])
    except MemoryError:
        module.__dict__.clear()  # or there is none to report it with
        return b"memory"
    except BaseException as error:
        return b" ".join([b"runtime_error", describe(error)])
    return b"pass"


def describe(error):
    """One line; asking the error for its text runs code of the program."""
    inside = error.__traceback__.tb_next
    text = f"{f'line {inside.tb_lineno}: ' if inside else ''}{type(error).__name__}: {error}"[:500]
    return text.encode(errors="replace").replace(b"\0", b" ")


def contain(job):
    """Gives up rights, as far as this system has a way to; each layer does without the others."""
    layers = job["layers"]
    if layers:
        libc = ctypes.CDLL(None)
        libc.syscall.argtypes = [ctypes.c_long] + [ctypes.c_void_p] * 4
        libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 4
        if "namespaces" in layers:
            isolate(libc)
        libc.prctl(PARENT_DEATH_SIGNAL, _signal.SIGKILL, 0, 0, 0)
        libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # root keeps its files and nothing else
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    limit(job["limits"])
    if "landlock" in layers:
        confine(libc, job["readable"])
    if "seccomp" in layers:
        refuse(libc)


def isolate(libc):
    """No network and no view of other processes, by namespaces; does nothing where the kernel forbids it."""
    if libc.unshare(NEW_USER | NEW_NETWORK | NEW_PROCESSES) and libc.unshare(NEW_NETWORK | NEW_PROCESSES):
        return
    if child := os.fork():  # only a child is inside the new process namespace; all in it die with it
        _signal.signal(_signal.SIGTERM, lambda *_: os.kill(child, _signal.SIGKILL))
        libc.prctl(PARENT_DEATH_SIGNAL, _signal.SIGKILL, 0, 0, 0)
        os.waitpid(child, 0)
        os._exit(0)
    # Once the first process of a namespace has ended, the kernel refuses any other: no fork, even for root.
    if not libc.unshare(NEW_PROCESSES):
        if not os.fork():
            os._exit(0)
        os.wait()


def limit(limits):
    """Sets limits on the use of resources that the program cannot raise."""
    for name, value in limits.items():
        number = getattr(resource, name, None)
        try:
            hard = resource.getrlimit(number)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (value, value))
        except (OSError, TypeError, ValueError):
            pass  # this system has no such limit


def confine(libc, readable):
    """By Landlock: files are written only in this folder, and read only there and where `readable` says."""
    version = libc.syscall(CREATE_RULESET, None, 0, 1, 0)
    if version < 1:
        return
    rights = (1 << ACCESS_BITS[min(version, len(ACCESS_BITS)) - 1]) - 1
    network, scopes = 0b11 if version >= 4 else 0, 0b11 if version >= 6 else 0
    rules = libc.syscall(CREATE_RULESET, struct.pack("QQQ", rights, network, scopes), 24, 0, 0)
    if rules < 0:
        return
    inside = rights & ~(EXECUTE | MAKE_DEVICES | DEVICE_CONTROL)
    for path, allowed in [(".", inside), ("/dev/null", READ_FILE | WRITE_FILE), *((path, None) for path in readable)]:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # this system has no such path
        if allowed is None:
            allowed = READ_FILE | READ_FOLDER if os.path.isdir(path) else READ_FILE
        libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", allowed, opened), 0)
        os.close(opened)
    libc.syscall(RESTRICT_SELF, rules, 0, 0, 0)
    os.close(rules)


def refuse(libc):
    """By seccomp: system calls that reach other processes, the network or the machine fail with EPERM."""
    column, machine = MACHINES.get(os.uname().machine, (None, None))
    if column is None or sys.maxsize < 1 << 32:
        return
    step = struct.Struct("HBBI").pack  # operation, how far to jump if true and if false, operand
    load, equal, at_least, both, done = 0x20, 0x15, 0x35, 0x54, 0x06
    steps = [step(load, 0, 0, 4), step(equal, 1, 0, machine), step(done, 0, 0, KILL), step(load, 0, 0, 0)]
    steps += [step(at_least, 0, 1, 1 << 30), step(done, 0, 0, REFUSE)]  # x86_64 has a second set of numbers there
    for calls, answer in ((REFUSED, REFUSE), (IGNORED, IGNORE)):
        for numbers in calls.values():
            if numbers[column] is not None:
                steps += [step(equal, 0, 1, numbers[column]), step(done, 0, 0, answer)]
    for numbers, argument, bits, values, (then, otherwise) in CONDITIONAL.values():
        rest = [step(load, 0, 0, 16 + 8 * argument), step(both, 0, 0, bits)]
        for value in (os.getpid(),) if values is None else values:
            rest += [step(equal, 0, 1, value), step(done, 0, 0, then)]
        rest.append(step(done, 0, 0, otherwise))
        steps += [step(equal, 0, len(rest), numbers[column]), *rest]
    steps.append(step(done, 0, 0, ALLOW))
    code = ctypes.create_string_buffer(b"".join(steps))
    libc.prctl(SET_SECCOMP, 2, struct.pack("HP", len(steps), ctypes.addressof(code)), 0, 0)
