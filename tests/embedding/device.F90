! device FLOW: an evaluator on GPU 0 through fastmaf.f90. Without a GPU the status and why; else the largest difference from the CPU.
program device
    use, intrinsic :: iso_c_binding, only: c_null_ptr
    use, intrinsic :: iso_fortran_env, only: int64, real64
    use fastmaf
    implicit none
    integer, parameter :: rows = 1000
    type(flow_model) :: model
    type(flow_evaluator) :: cpu, gpu
    real(real64), allocatable :: x(:, :), there(:, :), value(:), value_there(:), d_x(:, :), d_there(:, :)
    character(1000) :: path
    character(300) :: text
    character(:), allocatable :: reason
    integer :: stat

    text = ''
    call get_command_argument(1, path)
    call model%open(path)
    call cpu%create(model)
    call gpu%create(model, device=0, threads=2, stat=stat, errmsg=text)
    if (stat /= fastmaf_invalid_argument) error stop
    call gpu%create(model, device=0, precision=fastmaf_high, stat=stat, errmsg=text)
    if (stat /= fastmaf_ok) then
        if (fastmaf_devices(reason) /= 0 .or. reason /= text) error stop
        print '(i0, 1x, i0, 1x, a)', fastmaf_devices(), stat, trim(text)
        stop
    end if
    call gpu%set_stream(c_null_ptr)
    allocate (x(model%features(), rows), there(model%features(), rows), value(rows), value_there(rows))
    call cpu%sample(x, seed=1_int64)
    call gpu%sample(there, seed=1_int64)
    call cpu%log_prob(x, value)
    call gpu%log_prob(x, value_there)
    there = abs(there - x)
    there(1, :) = max(there(1, :), abs(value_there - value))
    allocate (d_x, d_there, mold=x)
    call cpu%log_prob_and_grad(x, value, d_x)
    call gpu%log_prob_and_grad(x, value_there, d_there, stat=stat, errmsg=text)
    there = max(there, abs(d_there - d_x) / (1 + abs(d_x)))
    print '(i0, 1x, i0, 1x, es12.5)', fastmaf_devices(), stat, maxval(there)
end program
